"""Sealing of secret values: AES-256-GCM (NIST SP 800-38D), the name as associated data.

The nonce is an argument, 12 random bytes from the caller, because nothing here may be random.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

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
