"""How the processes of one cluster know each other: mutual TLS, a shared token, or loopback alone.

Certificates name a role, not a host: any host may run a worker, but a head may not pose as one.
Reads files and checks them; gRPC's side is in `guard` and `rpc`, making certificates in `certs`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from cluster.errors import ConfigurationError
from cluster.network import Network, is_loopback

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

Role = Literal["ingress", "head", "worker"]
ROLES: tuple[Role, ...] = get_args(Role)

CALLERS: Mapping[Role, Role] = {"head": "ingress", "worker": "head"}
"""Who may call a server of this role; its metrics are for every identity of the cluster."""

TOKEN_VARIABLE = "MAESTRALE_CLUSTER_TOKEN"
_TOKEN = re.compile(r"[\x21-\x7e]{16,1024}")


def identity_of(role: Role) -> str:
    """The DNS name that stands in a certificate for a role. Nothing ever looks it up."""
    return f"{role}.maestrale.internal"


@dataclass(frozen=True)
class Pem:
    """What one side of a TLS handshake takes."""

    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class TlsFiles:
    """Where a process of this role finds the cluster's CA and its own certificate."""

    folder: Path
    role: Role

    def paths(self) -> tuple[Path, Path, Path]:
        """Of CA, certificate and private key."""
        role = self.role
        return tuple(self.folder / f"{name}.pem" for name in ("ca", role, f"{role}-key"))  # type: ignore[return-value]

    def read(self) -> Pem:
        """The files as they are now. Raises ConfigurationError when one cannot be read."""
        return Pem(*(_read(path) for path in self.paths()))

    def check(self) -> None:
        """Find out before anybody connects whether peers can accept this identity.

        Raises ConfigurationError, naming the file at fault.
        """
        from cryptography import x509
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        ca_path, path, key_path = self.paths()
        pem = self.read()
        try:
            authorities = x509.load_pem_x509_certificates(pem.ca)
            chain = x509.load_pem_x509_certificates(pem.certificate)
            key = load_pem_private_key(pem.key, password=None)
        except (ValueError, TypeError) as error:
            raise ConfigurationError(
                f"{ca_path}, {path} and {key_path} must be PEM files without a password: {error}"
            ) from error
        certificate = chain[0]
        if certificate.public_key() != key.public_key():
            raise ConfigurationError(f"{key_path} is not the private key of {path}")
        names = _names_in(certificate)
        if identity_of(self.role) not in names:
            raise ConfigurationError(
                f"{path} is for {names}: a {self.role} needs {identity_of(self.role)}"
            )
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if not begins <= datetime.now(UTC) <= ends:
            raise ConfigurationError(
                f"{path} is valid from {begins:%Y-%m-%d} to {ends:%Y-%m-%d} only: delete it and "
                "its key, and run `maestrale certs` again"
            )
        if not any(_has_signed(authority, chain[-1]) for authority in authorities):
            raise ConfigurationError(f"{path} is not signed by the cluster's CA in {ca_path}")


@dataclass(frozen=True)
class Security:
    """How this process shows who it is and knows its peers. Without both: loopback only."""

    tls: TlsFiles | None = None
    token: str | None = field(default=None, repr=False)
    allow_plaintext: bool = False
    """Listen off loopback with neither, knowingly."""

    @classmethod
    def load(cls, network: Network, role: Role, environ: Mapping[str, str]) -> "Security":
        """What this configuration means for a process of this role.

        Raises ConfigurationError when a file or the token is missing or cannot be used.
        """
        if network.tls_folder is not None:
            tls = TlsFiles(network.tls_folder.expanduser(), role)
            tls.check()
            return cls(tls)
        token = None
        if network.cluster_token_from is not None:
            token = _read_token(network.cluster_token_from, environ)
        return cls(token=token, allow_plaintext=network.allow_plaintext)

    def check_host(self, host: str) -> None:
        """Raise ConfigurationError unless a server may listen on this IP address."""
        if not (is_loopback(host) or self.tls or self.token or self.allow_plaintext):
            raise ConfigurationError(
                f"{host} is not loopback: set tls_folder (see `maestrale certs`), "
                "cluster_token_from, or, if that network is yours alone, allow_plaintext_network"
            )


def _read_token(source: Path | Literal["environment"], environ: Mapping[str, str]) -> str:
    if source == "environment":
        where, token = f"the environment variable {TOKEN_VARIABLE}", environ.get(TOKEN_VARIABLE, "")
    else:
        where, token = str(source), _read(source.expanduser()).decode("utf-8", errors="replace")
    token = token.strip()
    if not _TOKEN.fullmatch(token):
        raise ConfigurationError(
            f"{where} must hold a token of 16 to 1024 ASCII characters without spaces, and holds "
            f"{len(token)} characters; `openssl rand -hex 32` makes one"
        )
    return token


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error


def _names_in(certificate: "Certificate") -> list[str]:
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.DNSName)


def _has_signed(authority: "Certificate", certificate: "Certificate") -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
