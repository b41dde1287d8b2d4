"""The cluster's own certificates: one authority, and identities for nodes and edges.

The same identities guard the log, the agents and the API; nothing here is issued by, or meant
for, the public web. P-256 throughout (RFC 5480); validity and names as RFC 5280 has them.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import stat
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from reconciler.errors import MillError

CA_DAYS = 3650
IDENTITY_DAYS = 365
SKEW = datetime.timedelta(hours=1)
"""Certificates are valid from an hour ago, for nodes whose clocks are behind."""


class CertificateError(MillError):
    """A certificate file is missing, unreadable, or does not fit its key."""


class Authority(msgspec.Struct, frozen=True):
    """The cluster's CA, both in PEM. Who holds the key can be any node."""

    cert_pem: bytes
    key_pem: bytes

    def __repr__(self) -> str:
        return f"Authority({fingerprint(self.cert_pem)}, key=***)"


class Identity(msgspec.Struct, frozen=True):
    """A certificate with its key and the CA that signed it, all in PEM."""

    cert_pem: bytes
    key_pem: bytes
    ca_pem: bytes

    def __repr__(self) -> str:
        return f"Identity({fingerprint(self.cert_pem)}, key=***)"


def create_ca() -> Authority:
    """A new authority, good for ten years."""
    key = ec.generate_private_key(ec.SECP256R1())
    # The name carries a piece of the key: two clusters' authorities must never look alike.
    mark = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    name = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, f"mill cluster CA {mark.digest.hex()[:16]}")]
    )
    cert = (
        _builder(name, name, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(mark, critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(_pem(cert), _key_pem(key))


def issue(
    authority: Authority,
    name: str,
    ips: tuple[str, ...] = (),
    *,
    names: tuple[str, ...] = (),
    days: int = IDENTITY_DAYS,
) -> Identity:
    """A certificate for `name` (a DNS SAN, with `names` and `ips` beside it), as server and
    client. `days` is cut to the authority's own end."""
    ca = x509.load_pem_x509_certificate(authority.cert_pem)
    ca_key = _load_key(authority.key_pem, "the authority's key")
    key = ec.generate_private_key(ec.SECP256R1())
    alternatives: list[x509.GeneralName] = [
        x509.DNSName(dns) for dns in dict.fromkeys((name, *names))
    ]
    alternatives += [x509.IPAddress(ipaddress.ip_address(ip)) for ip in dict.fromkeys(ips)]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    left = (ca.not_valid_after_utc - datetime.datetime.now(datetime.UTC)).days
    cert = (
        _builder(subject, ca.subject, key.public_key(), min(days, left))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
            critical=False,
        )
        .sign(ca_key, hashes.SHA256())
    )
    return Identity(_pem(cert), _key_pem(key), authority.cert_pem)


def fingerprint(cert_pem: bytes) -> str:
    """SHA-256 of the certificate's DER, 64 hex digits; what a join token carries."""
    return x509.load_pem_x509_certificate(cert_pem).fingerprint(hashes.SHA256()).hex()


def expires(cert_pem: bytes) -> datetime.datetime:
    """When the certificate ends, UTC."""
    return x509.load_pem_x509_certificate(cert_pem).not_valid_after_utc


def write_authority(folder: Path, authority: Authority) -> None:
    """Keep the authority as `ca.pem` and `ca-key.pem` in `folder` (0700, files 0600)."""
    write_private(folder / "ca-key.pem", authority.key_pem)
    write_private(folder / "ca.pem", authority.cert_pem)


def load_authority(folder: Path) -> Authority:
    """The authority that `write_authority` kept."""
    authority = Authority(_read(folder / "ca.pem"), _read(folder / "ca-key.pem"))
    _check_pair(authority.cert_pem, authority.key_pem, folder)
    return authority


def write_identity(folder: Path, identity: Identity) -> None:
    """Keep an identity as `cert.pem`, `key.pem` and `ca.pem` in `folder` (0700, files 0600)."""
    write_private(folder / "ca.pem", identity.ca_pem)
    write_private(folder / "key.pem", identity.key_pem)
    write_private(folder / "cert.pem", identity.cert_pem)


def load_identity(folder: Path) -> Identity:
    """The identity that `write_identity` kept. A write that was cut short is an error here."""
    identity = Identity(
        _read(folder / "cert.pem"), _read(folder / "key.pem"), _read(folder / "ca.pem")
    )
    _check_pair(identity.cert_pem, identity.key_pem, folder)
    return identity


def write_private(path: Path, data: bytes) -> None:
    """Replace a file at once, readable by its owner alone, and flush it to the disk."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(stat.S_IRWXU)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False,
        key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        encipher_only=False, decipher_only=False,
    )


def _pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _load_key(pem: bytes, where: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except ValueError as error:
        raise CertificateError("a private key cannot be read", at=where) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError("a private key is not a P-256 key", at=where)
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(
            f"a certificate file cannot be read: {error.strerror}", at=str(path)
        ) from error


def _check_pair(cert_pem: bytes, key_pem: bytes, folder: Path) -> None:
    try:
        cert = x509.load_pem_x509_certificate(cert_pem)
    except ValueError as error:
        raise CertificateError("a certificate cannot be read", at=str(folder)) from error
    if cert.public_key() != _load_key(key_pem, str(folder)).public_key():
        raise CertificateError(
            "the certificate does not belong to the key beside it", at=str(folder),
            hint="delete the folder's files; the node gets new ones when it starts",
        )
