"""Snapshots: the machine's state at one index, in place of all entries up to it."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import msgspec

from reconciler.log import configuration
from reconciler.log.disk import Disk, replace_file
from reconciler.log.errors import DiskFailed, LogDamaged
from reconciler.log.settings import Membership

NAME = "snapshot"
MAGIC = b"mill snapshot 2\n"
MAGIC_1 = b"mill snapshot 1\n"  # without the members, from before they could change
MAX_BYTES = 1 << 30  # a live state is megabytes; bounds what a peer can make this node hold
_HEAD = struct.Struct("<QQQ")  # index, term, length of the body
_CRC = struct.Struct("<I")  # over head and body
_MEMBERS = struct.Struct("<I")  # begins the body: length of the members, which the state follows
HEAD_BYTES = len(MAGIC) + _HEAD.size + _CRC.size


@dataclass(frozen=True)
class Snapshot:
    """The state after applying the entry `index`, whose term was `term`.

    `members` are those in effect there; None in a file from before they could change.
    """

    index: int
    term: int
    state: bytes
    members: Membership | None = None


def encode(snapshot: Snapshot) -> bytes:
    """The file, and what crosses the network: magic, head, checksum, members, state."""
    members = b"" if snapshot.members is None else configuration.encode(snapshot.members)
    prefix = _MEMBERS.pack(len(members)) + members
    head = _HEAD.pack(snapshot.index, snapshot.term, len(prefix) + len(snapshot.state))
    crc = zlib.crc32(snapshot.state, zlib.crc32(prefix, zlib.crc32(head)))
    return b"".join((MAGIC, head, _CRC.pack(crc), prefix, snapshot.state))


def decode(data: bytes, path: str) -> Snapshot:
    """Verify and read; raises LogDamaged."""
    start = HEAD_BYTES
    if len(data) < start or not data.startswith((MAGIC, MAGIC_1)):
        raise LogDamaged("the snapshot does not begin as one", path, 0)
    index, term, length = _HEAD.unpack_from(data, len(MAGIC))
    head, body = data[len(MAGIC) : len(MAGIC) + _HEAD.size], data[start:]
    if len(body) != length:
        raise LogDamaged(f"the snapshot has {len(body)} bytes of {length}", path, len(data))
    if zlib.crc32(body, zlib.crc32(head)) != _CRC.unpack_from(data, start - _CRC.size)[0]:
        raise LogDamaged("the snapshot's checksum does not match", path, start)
    if data.startswith(MAGIC_1):
        return Snapshot(index, term, body)
    try:
        return Snapshot(index, term, *_open_body(body))
    except (struct.error, msgspec.MsgspecError) as error:
        raise LogDamaged(f"the snapshot's members: {error}", path, start) from error


def _open_body(body: bytes) -> tuple[bytes, Membership | None]:
    (size,) = _MEMBERS.unpack_from(body)
    end = _MEMBERS.size + size
    members = configuration.decode(body[_MEMBERS.size : end]) if size else None
    return body[end:], members


def index_of(head: bytes) -> int | None:
    """The index that a file of these first HEAD_BYTES claims; None where it is no snapshot."""
    if len(head) < HEAD_BYTES or not head.startswith((MAGIC, MAGIC_1)):
        return None
    index: int = _HEAD.unpack_from(head, len(MAGIC))[0]
    return index


class Snapshots:
    """The one snapshot of this node; the former one stays until the next is durable."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.path = disk.where(NAME)

    def load(self) -> Snapshot | None:
        """The snapshot, verified; None where there is none. Raises LogDamaged, DiskFailed."""
        data = self.read()
        return None if data is None else decode(data, self.path)

    def renew(self) -> None:
        """Verify what the disk holds, and write it anew; raises LogDamaged, DiskFailed."""
        try:
            data = self._disk.read_stored(NAME)
        except OSError as error:
            raise DiskFailed("the snapshot cannot be read", error, self.path) from error
        if data is not None:
            decode(data, self.path)
            self.store(data)

    def read(self) -> bytes | None:
        """The file as it is, to send to a follower; DiskFailed where the disk fails."""
        try:
            return self._disk.read(NAME)
        except OSError as error:
            raise DiskFailed("the snapshot cannot be read", error, self.path) from error

    def store(self, data: bytes) -> None:
        """Replace the snapshot by `data` (from `encode`); raises DiskFailed."""
        try:
            replace_file(self._disk, NAME, (data,))
        except OSError as error:
            raise DiskFailed("the snapshot cannot be written", error, self.path) from error
