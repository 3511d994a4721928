"""Who a process is: certificates made and checked, tokens read, loopback told from a network."""

import asyncio
import os
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from cluster import rpc
from cluster.certs import LIFETIME, Authority, write_certificates
from cluster.cli import app
from cluster.config import ServeConfig
from cluster.configure import gather
from cluster.errors import ConfigurationError
from cluster.ingress.auth import KEYS_VARIABLE
from cluster.network import Network, is_loopback
from cluster.security import ROLES, TOKEN_VARIABLE, Security

NOW = datetime.now(UTC)
TOKEN = "0123456789abcdef-correct"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete set of certificates."""
    write_certificates(tmp_path)
    return tmp_path


def load(folder: Path, role: str = "head") -> Security:
    return Security.load(Network(tls_folder=folder), role, {})  # type: ignore[arg-type]


# --- certificates ---


def test_what_certs_makes_is_accepted_for_its_role_and_only_that(folder: Path) -> None:
    for role in ROLES:
        assert load(folder, role).tls is not None
    for name in ("worker.pem", "worker-key.pem"):
        (folder / name).write_bytes((folder / name.replace("worker", "head")).read_bytes())
    with pytest.raises(ConfigurationError, match=r"a worker needs worker\.maestrale\.internal"):
        load(folder, "worker")


def test_private_keys_are_their_owners_only(folder: Path) -> None:
    keys = sorted(folder.glob("*-key.pem"))
    assert [path.name.removesuffix("-key.pem") for path in keys] == ["ca", *sorted(ROLES)]
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}


def test_a_second_run_changes_nothing_and_a_deleted_identity_is_made_anew(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert write_certificates(folder) == []
    renewed = [folder / "head.pem", folder / "head-key.pem"]
    for path in renewed:
        path.unlink()
    assert write_certificates(folder) == renewed
    assert load(folder).tls is not None  # by the same CA
    changed = [path for path, data in before.items() if path.read_bytes() != data]
    assert sorted(changed) == sorted(renewed)


def test_half_a_pair_is_neither_overwritten_nor_completed(folder: Path) -> None:
    (folder / "ca-key.pem").unlink()
    with pytest.raises(ConfigurationError, match=r"ca\.pem is there without its counterpart"):
        write_certificates(folder)
    assert not (folder / "ca-key.pem").exists()


def test_a_full_disk_leaves_no_half_of_a_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def open_on_full_disk(path: Path, flags: int, mode: int) -> int:
        descriptor = opened(path, flags, mode)
        if path.name != "head-key.pem":
            return descriptor
        os.close(descriptor)
        return opened("/dev/full", os.O_WRONLY)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_on_full_disk)
        with pytest.raises(ConfigurationError, match="No space left"):
            write_certificates(tmp_path)
    assert not list(tmp_path.glob("head*"))
    write_certificates(tmp_path)
    assert load(tmp_path).tls is not None


def test_an_identity_is_not_taken_for_a_ca(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"head\.pem is not a CA's: it may sign no other"):
        Authority.load(folder / "head.pem", folder / "head-key.pem")


def test_a_ca_of_another_kind_of_key_is_refused_for_that(tmp_path: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "another CA")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, NOW, NOW + LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, SHA256())
    )
    (tmp_path / "ca.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (tmp_path / "ca-key.pem").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    with pytest.raises(ConfigurationError, match="is not an elliptic-curve key"):
        write_certificates(tmp_path)


def test_the_command_says_what_it_wrote_and_how_to_use_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["certs", "--out", str(tmp_path / "tls")])
    assert result.exit_code == 0, result.output
    assert f"tls_folder: {tmp_path / 'tls'}" in result.output
    for path in (tmp_path / "tls").iterdir():
        assert f"wrote {path}\n" in result.output
    again = CliRunner().invoke(app, ["certs", "--out", str(tmp_path / "tls")])
    assert "nothing was written" in again.output


def _swap_key(folder: Path) -> None:
    (folder / "head-key.pem").write_bytes((folder / "worker-key.pem").read_bytes())


def _other_authority(folder: Path) -> None:
    (folder / "ca.pem").write_bytes(Authority.new(NOW).pem()[0])


def _expire(folder: Path) -> None:
    authority = Authority.load(folder / "ca.pem", folder / "ca-key.pem")
    pems = authority.issue("head", NOW - LIFETIME - timedelta(days=1))
    for name, pem in zip(("head.pem", "head-key.pem"), pems, strict=True):
        (folder / name).write_bytes(pem)


def _spoil(folder: Path) -> None:
    (folder / "head.pem").write_bytes(b"garbage")


def _remove(folder: Path) -> None:
    (folder / "ca.pem").unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_swap_key, r"head-key\.pem is not the private key of .*head\.pem"),
        (_other_authority, r"head\.pem is not signed by the cluster's CA in .*ca\.pem"),
        (_expire, r"head\.pem is valid from .* only: delete it"),
        (_spoil, "must be PEM files"),
        (_remove, r"cannot read .*ca\.pem: No such file"),
    ],
)
def test_files_that_no_peer_would_accept_are_refused_by_name(
    folder: Path, harm: Callable[[Path], None], message: str
) -> None:
    harm(folder)
    with pytest.raises(ConfigurationError, match=message):
        load(folder)


def test_a_ca_in_change_may_be_two(folder: Path) -> None:
    """So that a CA can be replaced identity by identity."""
    both = Authority.new(NOW).pem()[0] + (folder / "ca.pem").read_bytes()
    (folder / "ca.pem").write_bytes(both)
    assert load(folder).tls is not None


def test_certificates_that_are_away_for_a_moment_cost_a_peers_metrics_only(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As when they are renewed: who asks for the metrics of all still gets the others'."""
    security = load(folder, "ingress")
    (folder / "ingress.pem").unlink()
    assert asyncio.run(rpc.scrape("127.0.0.1:1", rpc.HEAD_SERVICE, security)) == ""
    assert "no metrics from 127.0.0.1:1: cannot read" in caplog.text


# --- tokens ---


def test_a_token_comes_from_its_file_or_the_environment_and_is_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    from_file = Security.load(Network(cluster_token_from=file), "worker", {})
    environ = {TOKEN_VARIABLE: TOKEN}
    from_environment = Security.load(Network(cluster_token_from="environment"), "worker", environ)
    assert from_file.token == from_environment.token == TOKEN
    assert TOKEN not in repr(from_file)
    assert Security.load(Network(), "worker", environ).token is None  # only if configured


@pytest.mark.parametrize("variable", [TOKEN_VARIABLE, KEYS_VARIABLE])
def test_a_variable_with_secrets_is_no_setting(variable: str) -> None:
    """Else they would be shown with the settings, and travel to every node."""
    config = gather(file=None, environ={variable: TOKEN}, flags={}).config
    assert config == ServeConfig()


@pytest.mark.parametrize("token", ["", "short", "two words of a token", "ü" * 20, "x" * 2000])
def test_a_token_that_is_none_is_refused_without_being_shown(token: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=TOKEN_VARIABLE) as from_environment:
        Security.load(Network(cluster_token_from="environment"), "head", {TOKEN_VARIABLE: token})
    file = tmp_path / "token"
    file.write_text(token)
    with pytest.raises(ConfigurationError, match=str(file)) as from_file:
        Security.load(Network(cluster_token_from=file), "head", {})
    if token:
        assert token not in f"{from_environment.value}{from_file.value}"


# --- where one may listen ---


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_loopback_needs_nothing(host: str) -> None:
    assert is_loopback(host)
    Security().check_host(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "::ffff:10.1.2.3"])
def test_a_network_needs_certificates_or_a_token_or_a_choice(host: str, folder: Path) -> None:
    assert not is_loopback(host)
    with pytest.raises(ConfigurationError, match="set tls_folder"):
        Security().check_host(host)
    for security in (load(folder), Security(token=TOKEN), Security(allow_plaintext=True)):
        security.check_host(host)
