"""The cluster's own certificates: one authority, and identities for nodes and edges.

The same identities guard the log, the agents and the API; nothing here is issued by, or meant
for, the public web. P-256 throughout (RFC 5480); validity and names as RFC 5280 has them.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
import stat
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from reconciler.errors import MillError

CA_DAYS = 3650
IDENTITY_DAYS = 365
MAX_CSR_BYTES = 16 << 10
LOOPBACK = "127.0.0.1"
SKEW = datetime.timedelta(hours=1)
"""Certificates are valid from an hour ago, for nodes whose clocks are behind."""
_KEY_BEGINS = b"-----BEGIN PRIVATE KEY-----"


class CertificateError(MillError):
    """A certificate file is missing, unreadable, or does not fit its key."""


class RequestRefused(CertificateError):
    """A certificate request (PKCS #10, RFC 2986) that is not signed: what is wrong with it."""

    status = 422


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
    days: float = IDENTITY_DAYS,
) -> Identity:
    """A certificate for `name` (a DNS SAN, with `names` and `ips` beside it), as server and
    client. `days` is cut to the authority's own end."""
    key = ec.generate_private_key(ec.SECP256R1())
    cert = _certify(authority, key.public_key(), name, ips, names, days)
    return Identity(cert, _key_pem(key), authority.cert_pem)


def create_key_and_csr(name: str, ips: tuple[str, ...] = ()) -> tuple[bytes, bytes]:
    """A new key and a request for a certificate of `name`, both in PEM. The key stays here."""
    key_pem = _key_pem(ec.generate_private_key(ec.SECP256R1()))
    return key_pem, csr_for(key_pem, name, ips)


def csr_for(key_pem: bytes, name: str, ips: tuple[str, ...] = ()) -> bytes:
    """A request (PEM) for a certificate of `name` with a key that is there already."""
    wanted: list[x509.GeneralName] = [x509.DNSName(name)]
    wanted += [x509.IPAddress(ipaddress.ip_address(ip)) for ip in dict.fromkeys(ips)]
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .add_extension(x509.SubjectAlternativeName(wanted), critical=False)
        .sign(_load_key(key_pem, "the node's key"), hashes.SHA256())
    )
    return csr.public_bytes(serialization.Encoding.PEM)


def sign(
    authority: Authority, csr_pem: bytes, name: str, ips: tuple[str, ...],
    days: float = IDENTITY_DAYS,
) -> bytes:
    """The certificate (PEM) of node `name`, which is reached at `ips`, for the key of the request.

    Names and addresses are the signer's: `name`, `ips`, and what a node calls itself. Raises
    RequestRefused where the request is not its key's own, or is for another name.
    """
    request = _read_request(csr_pem)
    asked = [str(part.value) for part in request.subject]
    try:
        extension = request.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        asked += extension.value.get_values_for_type(x509.DNSName)
    except x509.ExtensionNotFound:
        pass
    except ValueError as error:
        raise RequestRefused("the certificate request cannot be read") from error
    if set(asked) != {name}:
        shown = ", ".join(sorted(set(asked)))[:200]
        raise RequestRefused(f"the certificate request is for {shown or 'nobody'}, not for {name}",
                             hint="a node asks for a certificate of its own name alone")
    key = request.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey), "as it was read"
    return _certify(authority, key, name, (*ips, LOOPBACK), ("localhost",), days)


class CsrSigner:
    """Signs requests for certificates that last `days`, with a CA that its caller holds."""

    def __init__(self, days: float = IDENTITY_DAYS) -> None:
        self._days = days

    def key_of(self, csr_pem: bytes) -> str:
        """Hex SHA-256 of the request's public key; RequestRefused for what is no request."""
        return public_key_sha256(csr_pem)

    def sign(
        self, ca_pem: bytes, ca_key_pem: bytes, csr_pem: bytes, name: str, ips: tuple[str, ...]
    ) -> bytes:
        """The certificate, as `sign` makes it."""
        return sign(Authority(ca_pem, ca_key_pem), csr_pem, name, ips, self._days)


def public_key_sha256(pem: bytes) -> str:
    """Hex SHA-256 of the public key (DER, SubjectPublicKeyInfo) of a request or a certificate."""
    if b"-----BEGIN CERTIFICATE-----" in pem:
        key = x509.load_pem_x509_certificate(pem).public_key()
    else:
        key = _read_request(pem).public_key()
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


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
    """Keep an identity in `folder` (0700, files 0600): `cert.pem` is the certificate and its key,
    `key.pem` a link to it, `ca.pem` the CA.

    Both are one file because it is replaced while the node runs: with two, a power cut in between
    would leave a certificate beside another one's key.
    """
    write_private(folder / "ca.pem", identity.ca_pem)
    write_private(folder / "cert.pem", identity.cert_pem + identity.key_pem)
    if not (folder / "key.pem").is_symlink():
        linked = folder / f".key.pem.{os.getpid()}"
        linked.unlink(missing_ok=True)
        linked.symlink_to("cert.pem")
        linked.replace(folder / "key.pem")


def load_identity(folder: Path) -> Identity:
    """The identity that `write_identity` kept."""
    kept = _read(folder / "cert.pem")
    cert, marker, key = kept.partition(_KEY_BEGINS)
    key = marker + key if marker else _read(folder / "key.pem")
    identity = Identity(cert, key, _read(folder / "ca.pem"))
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


def _certify(
    authority: Authority, key: ec.EllipticCurvePublicKey, name: str, ips: tuple[str, ...],
    names: tuple[str, ...], days: float,
) -> bytes:
    """A certificate as server and client; it ends with its authority at the latest."""
    ca = x509.load_pem_x509_certificate(authority.cert_pem)
    ca_key = _load_key(authority.key_pem, "the authority's key")
    alternatives: list[x509.GeneralName] = [
        x509.DNSName(dns) for dns in dict.fromkeys((name, *names))
    ]
    alternatives += [x509.IPAddress(ipaddress.ip_address(ip)) for ip in dict.fromkeys(ips)]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    left = ca.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    life_days = min(days, left / datetime.timedelta(days=1))
    cert = (
        _builder(subject, ca.subject, key, life_days)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
            critical=False,
        )
        .sign(ca_key, hashes.SHA256())
    )
    return _pem(cert)


def _read_request(csr_pem: bytes) -> x509.CertificateSigningRequest:
    """The request, if it is one for a P-256 key that was signed with that key."""
    if len(csr_pem) > MAX_CSR_BYTES:
        raise RequestRefused(f"a certificate request of {len(csr_pem)} bytes",
                             hint=f"at most {MAX_CSR_BYTES}")
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        key = request.public_key()
        genuine = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise RequestRefused("the certificate request cannot be read") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise RequestRefused("the certificate request is not for a P-256 key")
    if not genuine:
        raise RequestRefused("the certificate request is not signed with its own key")
    return request


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: float
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
