"""Making a cluster's certificate authority and the certificates that it signs, as PEM files.

Knows no gRPC and no configuration; `security` says what a certificate must look like.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cluster.errors import ConfigurationError
from cluster.security import ROLES, Role, identity_of

CA_LIFETIME = timedelta(days=10 * 365)
LIFETIME = timedelta(days=365)
"""Of an identity; long enough to renew by hand."""

_CLOCKS_DIFFER = timedelta(hours=1)
"""A certificate is valid from so long before it was made."""

_USAGES = {
    "ingress": [ExtendedKeyUsageOID.CLIENT_AUTH],
    "head": [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH],
    "worker": [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH],
}
"""Who calls whom: an ingress answers no process; a worker calls lenders."""


@dataclass(frozen=True)
class Authority:
    """A CA with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def new(cls, now: datetime) -> "Authority":
        """A CA that can sign identities, but no further CA."""
        key = ec.generate_private_key(ec.SECP256R1())
        serial = x509.random_serial_number()
        # a name of its own, so that certificates of another cluster's CA are told apart by it
        name = _name(f"maestrale cluster {serial:x}"[:64])
        certificate = (
            _builder(name, name, key.public_key(), serial, now, CA_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(_key_identifier(key), critical=False)
            .sign(key, SHA256())
        )
        return cls(certificate, key)

    @classmethod
    def load(cls, certificate_path: Path, key_path: Path) -> "Authority":
        """Raises ConfigurationError when the files are not those of a CA."""
        try:
            certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
            key = load_pem_private_key(key_path.read_bytes(), password=None)
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigurationError(
                f"{certificate_path} and {key_path} are not a CA and its key: {error}"
            ) from error
        except x509.ExtensionNotFound as error:
            raise ConfigurationError(f"{certificate_path} is not a CA's: {error}") from error
        if not constraints.value.ca:
            raise ConfigurationError(f"{certificate_path} is not a CA's: it may sign no other")
        if certificate.public_key() != key.public_key():
            raise ConfigurationError(f"{key_path} is not the key of {certificate_path}")
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigurationError(
                f"{key_path} is not an elliptic-curve key: no other kind of CA is supported"
            )
        return cls(certificate, key)

    def issue(
        self, role: Role, now: datetime, lifetime: timedelta = LIFETIME
    ) -> tuple[bytes, bytes]:
        """Certificate and private key of a new identity, as PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        serial = x509.random_serial_number()
        issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        issuer = self.certificate.subject
        certificate = (
            _builder(_name(role), issuer, key.public_key(), serial, now, lifetime)
            .add_extension(
                x509.SubjectAlternativeName([x509.DNSName(identity_of(role))]), critical=False
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(_USAGES[role]), critical=False)
            .add_extension(_key_identifier(key), critical=False)
            .add_extension(issuer_key, critical=False)
            .sign(self.key, SHA256())
        )
        return certificate.public_bytes(Encoding.PEM), _private_pem(key)

    def pem(self) -> tuple[bytes, bytes]:
        """Certificate and private key."""
        return self.certificate.public_bytes(Encoding.PEM), _private_pem(self.key)


def write_certificates(
    folder: Path, *, now: datetime | None = None, roles: Iterable[Role] = ROLES
) -> list[Path]:
    """Fill a folder with a CA and an identity for each role; returns what was written.

    What is there stays: an existing CA signs the identities that are missing, and a second run
    writes nothing. Private keys can be read by their owner only.
    Raises ConfigurationError when only one file of a pair is there, or one cannot be used.
    """
    now = now or datetime.now(UTC)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        written = []
        ca, ca_key = folder / "ca.pem", folder / "ca-key.pem"
        if _is_missing(ca, ca_key):
            authority = Authority.new(now)
            written += _write_pair(ca, ca_key, authority.pem())
        else:
            authority = Authority.load(ca, ca_key)
        for role in roles:
            paths = folder / f"{role}.pem", folder / f"{role}-key.pem"
            if _is_missing(*paths):
                written += _write_pair(*paths, authority.issue(role, now))
    except OSError as error:
        raise ConfigurationError(f"cannot write to {folder}: {error}") from error
    return written


def _is_missing(certificate: Path, key: Path) -> bool:
    """Whether neither file is there. Raises ConfigurationError if only one is."""
    found = [path for path in (certificate, key) if path.exists()]
    if len(found) == 1:
        raise ConfigurationError(
            f"{found[0]} is there without its counterpart: nothing is overwritten; restore or "
            "remove it"
        )
    return not found


def _write_pair(certificate: Path, key: Path, pems: tuple[bytes, bytes]) -> list[Path]:
    """Both or, where that fails, none: half a pair would stop the next run."""
    written = []
    try:
        for path, data, mode in ((certificate, pems[0], 0o644), (key, pems[1], 0o600)):
            # O_EXCL: a file that came meanwhile is somebody else's
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            written.append(path)
            with open(descriptor, "wb") as file:
                file.write(data)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return written


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    serial: int,
    now: datetime,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(
        subject_name=subject,
        issuer_name=issuer,
        public_key=key,
        serial_number=serial,
        not_valid_before=now - _CLOCKS_DIFFER,
        not_valid_after=now + lifetime,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_identifier(key: ec.EllipticCurvePrivateKey) -> x509.SubjectKeyIdentifier:
    return x509.SubjectKeyIdentifier.from_public_key(key.public_key())


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
