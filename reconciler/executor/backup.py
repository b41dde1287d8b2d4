"""A backup as one file under a passphrase, and the way of one into an empty cluster.

The cluster's key never leaves its nodes: each secret is opened with it and sealed anew with a key
of the backup's own, which is in the file; a restore goes the same way to the new cluster's key.
So the file and its passphrase are all that is needed after a total loss.

The file: MAGIC, the header's length (4 bytes, big-endian), the header (JSON, in clear), then
AES-256-GCM (NIST SP 800-38D) of zlib of msgpack `_Sealed`, then the SHA-256 of all that precedes.
The header is the associated data; its key is scrypt (RFC 7914) of the passphrase. The checksum
tells a damaged file from a wrong passphrase.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable

import msgspec
from msgspec.structs import replace

from reconciler.errors import Conflict, Unprocessable
from reconciler.executor.ledger import Ledger
from reconciler.fsm.apply_restore import why_not_empty
from reconciler.fsm.backup import (
    Contents,
    contents,
    decode_contents,
    digest,
    encode_contents,
)
from reconciler.fsm.commands import RestoreState
from reconciler.fsm.records import Secret
from reconciler.fsm.seal import (
    KEY_BYTES,
    NONCE_BYTES,
    key_of,
    seal,
    seal_file,
    unseal,
    unseal_file,
)
from reconciler.fsm.state import State

MAGIC = b"mill backup 1\n"
MAX_FILE_BYTES = 64 << 20
"""The live state of 20 machines is a few MiB; bounds what a restore holds in memory."""
MAX_CONTENTS_BYTES = 256 << 20
"""Once inflated: a small file may claim much."""
MAX_HEADER_BYTES = 64 << 10
PIECE_BYTES = 192 << 10
"""Of a RestoreState: below the bound of a log entry, and of a transport frame."""
MIN_PASSPHRASE_CHARS = 12
MAX_PASSPHRASE_CHARS = 1024
SALT_BYTES = 16
SCRYPT_N, SCRYPT_R, SCRYPT_P = 1 << 16, 8, 2
"""64 MiB and about a third of a second a guess (OWASP's second choice, for small machines)."""

_LENGTH = struct.Struct(">I")
_SHA256_BYTES = 32
_DAMAGED_HINT = "use another copy of it"

Random = Callable[[int], bytes]


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup says of itself in clear; `time_ms` is the log's time at `index`."""

    cluster: str
    index: int
    time_ms: int
    salt: bytes
    nonce: bytes
    n: int
    r: int
    p: int


class _Sealed(msgspec.Struct, frozen=True):
    key: bytes
    contents: bytes


class Opened(msgspec.Struct, frozen=True):
    """A backup that its passphrase has opened; its secrets are sealed with `key`."""

    key: bytes
    contents: Contents


def check_passphrase(passphrase: str) -> None:
    """Unprocessable where it is none, or too easily found."""
    if not passphrase:
        raise Unprocessable("a backup holds every secret: it is made under a passphrase only",
                            hint="mill backup asks for one, or reads --passphrase-file")
    if not MIN_PASSPHRASE_CHARS <= len(passphrase) <= MAX_PASSPHRASE_CHARS:
        raise Unprocessable(f"a passphrase of {len(passphrase)} characters",
                            hint=f"from {MIN_PASSPHRASE_CHARS} to {MAX_PASSPHRASE_CHARS}")


def make_backup(state: State, cluster_key: bytes, passphrase: str, random: Random) -> bytes:
    """The file. Takes about a second of one core; CannotUnseal where a secret does not open."""
    check_passphrase(passphrase)
    own_key = random(KEY_BYTES)
    carried = _resealed(contents(state), cluster_key, own_key, random)
    header = Header(
        cluster=state.cluster, index=state.index, time_ms=state.time_ms, salt=random(SALT_BYTES),
        nonce=random(NONCE_BYTES), n=SCRYPT_N, r=SCRYPT_R, p=SCRYPT_P,
    )
    plain = msgspec.msgpack.encode(_Sealed(own_key, encode_contents(carried)))
    written = msgspec.json.encode(header)
    begin = MAGIC + _LENGTH.pack(len(written)) + written
    sealed = seal_file(_key(passphrase, header), header.nonce, begin, zlib.compress(plain))
    if len(begin) + len(sealed) + _SHA256_BYTES > MAX_FILE_BYTES:
        raise Conflict(f"the backup would have {len(sealed) >> 20} MiB, and no restore takes over "
                       f"{MAX_FILE_BYTES >> 20}",
                       hint="keep large content out of manifests and secrets")
    return begin + sealed + hashlib.sha256(begin + sealed).digest()


def open_backup(data: bytes, passphrase: str) -> Opened:
    """Verify and open a file; Unprocessable says whether it is damaged or the passphrase wrong."""
    header, begins_at = _header(data)
    packed = unseal_file(_key(passphrase, header), header.nonce, data[:begins_at],
                         data[begins_at:-_SHA256_BYTES])
    if packed is None:
        raise Unprocessable("the passphrase does not open this backup",
                            hint=f"the one under which the backup of {header.cluster} at index "
                                 f"{header.index} was made")
    inflate = zlib.decompressobj()
    try:
        plain = inflate.decompress(packed, MAX_CONTENTS_BYTES)
        sealed = msgspec.msgpack.decode(plain, type=_Sealed)
    except (zlib.error, msgspec.DecodeError) as error:
        raise Unprocessable(f"the backup cannot be read: {error}") from error
    return Opened(sealed.key, decode_contents(sealed.contents))


async def restore(
    ledger: Ledger, opened: Opened, cluster_key: bytes, random: Random
) -> tuple[int, Contents]:
    """Take a backup over: the index after which all of it is there, and what it was.

    Leader only. Conflict, with nothing changed, where the cluster is not empty.
    """
    occupied = why_not_empty(ledger.state)
    if occupied:
        raise Conflict(f"{occupied}: a backup is restored into an empty one",
                       hint="found a new cluster, and restore before anything is deployed")
    carried = _resealed(opened.contents, opened.key, cluster_key, random)
    data = encode_contents(carried)
    name = digest(data)
    pieces = [data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)]
    index = 0
    for number, piece in enumerate(pieces):
        index = await ledger.propose(RestoreState(name, number, len(pieces), piece))
    return index, carried


def _header(data: bytes) -> tuple[Header, int]:
    """The header, the whole file checked, and where its sealed part begins."""
    if not data.startswith(MAGIC):
        raise Unprocessable("this is no backup of mill", hint="mill backup FILE makes one")
    if len(data) > MAX_FILE_BYTES:
        raise Unprocessable(f"a backup of {len(data) >> 20} MiB",
                            hint=f"at most {MAX_FILE_BYTES >> 20}")
    body = len(MAGIC) + _LENGTH.size
    if len(data) < body + _SHA256_BYTES \
            or hashlib.sha256(data[:-_SHA256_BYTES]).digest() != data[-_SHA256_BYTES:]:
        raise Unprocessable("the backup is damaged: its checksum does not match",
                            hint=_DAMAGED_HINT)
    (length,) = _LENGTH.unpack_from(data, len(MAGIC))
    if length > MAX_HEADER_BYTES:
        raise Unprocessable("the backup's header is too long", hint=_DAMAGED_HINT)
    try:
        header = msgspec.json.decode(data[body : body + length], type=Header)
    except msgspec.DecodeError as error:
        raise Unprocessable(f"the backup's header cannot be read: {error}",
                            hint=_DAMAGED_HINT) from error
    # What a file may ask for is bounded, or it could take a node's memory.
    if (header.n, header.r, header.p) != (SCRYPT_N, SCRYPT_R, SCRYPT_P) \
            or len(header.nonce) != NONCE_BYTES or len(header.salt) != SALT_BYTES:
        raise Unprocessable("the backup is sealed in a way that this version does not know",
                            hint="restore it with the version that wrote it, or a newer one")
    return header, body + length


def _key(passphrase: str, header: Header) -> bytes:
    return key_of(passphrase, header.salt, n=header.n, r=header.r, p=header.p)


def _resealed(carried: Contents, old: bytes, new: bytes, random: Random) -> Contents:
    def renewed(secret: Secret) -> Secret:
        versions = []
        for version in secret.versions:
            value = unseal(old, version.nonce, secret.name, version.sealed)
            nonce = random(NONCE_BYTES)
            sealed = seal(new, nonce, secret.name, value)
            versions.append(replace(version, nonce=nonce, sealed=sealed))
        return replace(secret, versions=tuple(versions))

    return replace(carried, secrets={n: renewed(s) for n, s in carried.secrets.items()})
