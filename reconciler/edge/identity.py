"""A node's certificate through its life: kept on disk, due in time, replaced whole."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

from cryptography import x509

from reconciler.edge.certificates import (
    SKEW,
    CertificateError,
    Identity,
    create_key_and_csr,
    csr_for,
    load_identity,
    public_key_sha256,
    write_identity,
)


def utc_now() -> datetime.datetime:
    """The time, as certificates tell it."""
    return datetime.datetime.now(datetime.UTC)


class NodeIdentity:
    """The identity in `folder`. Blocking, but short: a file or two."""

    def __init__(
        self, name: str, folder: Path, now: Callable[[], datetime.datetime] = utc_now
    ) -> None:
        self._name = name
        self._folder = folder
        self._now = now
        self._key_pem = b""
        self.identity = load_identity(folder)

    def due_in_s(self) -> float:
        """Seconds until less than a third of the certificate's life is left; negative after."""
        begins, ends = _life(self.identity.cert_pem)
        return (ends - (ends - begins) / 3 - self._now()).total_seconds()

    def left_s(self) -> float:
        """Seconds until the certificate ends; negative after."""
        return (_life(self.identity.cert_pem)[1] - self._now()).total_seconds()

    def request(self) -> bytes:
        """A request (PEM) for a new key, which is held in memory until `keep`."""
        self._key_pem, csr_pem = create_key_and_csr(self._name)
        return csr_pem

    def keep(self, certificate: bytes) -> tuple[bytes, bytes, bytes]:
        """Replace the identity on disk by the certificate for the requested key; CA, certificate
        and key in PEM. CertificateError, and nothing replaced, where it is not what was asked."""
        renewed = Identity(certificate, self._key_pem, self.identity.ca_pem)
        _check(renewed, self._name, self._now())
        write_identity(self._folder, renewed)
        self.identity = renewed
        return renewed.ca_pem, renewed.cert_pem, renewed.key_pem


def _life(cert_pem: bytes) -> tuple[datetime.datetime, datetime.datetime]:
    cert = x509.load_pem_x509_certificate(cert_pem)
    return cert.not_valid_before_utc + SKEW, cert.not_valid_after_utc


def _check(identity: Identity, name: str, now: datetime.datetime) -> None:
    """What is kept is what the node runs with: a wrong one would shut it out."""
    try:
        cert = x509.load_pem_x509_certificate(identity.cert_pem)
        cert.verify_directly_issued_by(x509.load_pem_x509_certificate(identity.ca_pem))
        names = cert.extensions.get_extension_for_class(
            x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)
    except Exception as error:  # cryptography raises many kinds
        raise CertificateError("the renewed certificate is not the cluster's") from error
    csr_key = public_key_sha256(csr_for(identity.key_pem, name))
    if public_key_sha256(identity.cert_pem) != csr_key or name not in names \
            or cert.not_valid_after_utc <= now:
        raise CertificateError("the renewed certificate is not the one that was asked for")
