"""Sealing: AES-256-GCM (NIST SP 800-38D) of secret values, with the name as associated data, and
of whole files; keys out of passphrases by scrypt (RFC 7914).

The nonce is an argument, 12 random bytes from the caller, because nothing here may be random.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from reconciler.errors import MillError

NONCE_BYTES = 12
KEY_BYTES = 32


class CannotUnseal(MillError):
    """The cluster's key does not open this value."""


def seal(key: bytes, nonce: bytes, name: str, value: str) -> bytes:
    """Encrypt a secret's value under the cluster key (32 bytes)."""
    return AESGCM(key).encrypt(nonce, value.encode(), name.encode())


def unseal(key: bytes, nonce: bytes, name: str, sealed: bytes) -> str:
    """The clear text; CannotUnseal where key, name or bytes do not belong together."""
    try:
        return AESGCM(key).decrypt(nonce, sealed, name.encode()).decode()
    except InvalidTag as error:
        raise CannotUnseal(f"secret {name} does not open with this cluster's key",
                           hint="set it again with: mill secret set " + name) from error


def seal_file(key: bytes, nonce: bytes, about: bytes, data: bytes) -> bytes:
    """Encrypt bytes; `about` stays in clear beside them and is authenticated with them."""
    return AESGCM(key).encrypt(nonce, data, about)


def unseal_file(key: bytes, nonce: bytes, about: bytes, sealed: bytes) -> bytes | None:
    """The bytes, or None where the key is another or something was changed."""
    try:
        return AESGCM(key).decrypt(nonce, sealed, about)
    except InvalidTag:
        return None


def key_of(passphrase: str, salt: bytes, *, n: int, r: int, p: int) -> bytes:
    """The key of a passphrase; takes 128 * n * r bytes of memory, and time for p times that."""
    kdf = Scrypt(salt=salt, length=KEY_BYTES, n=n, r=r, p=p)
    return kdf.derive(passphrase.encode())
