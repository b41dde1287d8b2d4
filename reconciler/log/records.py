"""The journal's bytes: records, and what a file of them says after a crash. Pure.

A record is a head (mark, kind, length, batch, index, term), a CRC-32 over head and
payload, then the payload. `batch` is the offset at which the write began that this record
was part of; the next write begins only after that one was synced. So:

* Damage with a valid record behind it whose batch began AFTER the damage is damage to what
  was once synced: the file cannot be trusted (`LogDamaged`).
* Otherwise a crash tore the last write, in whatever order the disk took its sectors.
  Nothing in it was acknowledged; it is cut from the damage on.

A file that was written whole and renamed into place begins with a BASE record, which says
up to where it was synced as one: damage below that is never a torn write.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

import msgspec

from reconciler.log.errors import LogDamaged

MAGIC = b"mill log 1\n"
ENTRY, CUT, VOTE, BASE = 1, 2, 3, 4
COMMAND, NO_OP, CONFIGURATION = b"\0", b"\1", b"\2"  # an entry's first byte, as pysyncobj has it
MARK = 0x4CB5  # begins each record, so that a search for records behind damage is fast
MAX_PAYLOAD_BYTES = 8 << 20  # above any entry; bounds what a damaged length can claim
_HEAD = struct.Struct("<HBxIQQQ")  # mark, kind, payload length, batch, index, term
_CRC = struct.Struct("<I")
OVERHEAD_BYTES = _HEAD.size + _CRC.size
_MARK_BYTES = struct.pack("<H", MARK)


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One place in the log: the command's bytes, its index (from 1), its term."""

    command: bytes
    index: int
    term: int


@dataclass(frozen=True)
class Record:
    """One decoded record and the offset behind it."""

    kind: int
    batch: int
    index: int
    term: int
    payload: bytes
    end: int


@dataclass
class Recovered:
    """What a journal file says: its entries, the term, the vote, and where to write on."""

    entries: list[Entry] = field(default_factory=list)
    term: int = 0
    vote: str | None = None
    base: int = 0
    end: int = 0
    torn_bytes: int = 0


def encode(kind: int, batch: int, index: int, term: int, payload: bytes) -> bytes:
    """One record."""
    head = _HEAD.pack(MARK, kind, len(payload), batch, index, term)
    return head + _CRC.pack(zlib.crc32(payload, zlib.crc32(head))) + payload


def encode_entry(batch: int, entry: Entry) -> bytes:
    """The record of an entry."""
    return encode(ENTRY, batch, entry.index, entry.term, entry.command)


def encode_vote(batch: int, term: int, vote: str | None) -> bytes:
    """The record of the current term and whom this node voted for in it."""
    return encode(VOTE, batch, 0, term, (vote or "").encode())


def decode(data: bytes, offset: int) -> Record | None:
    """The record at `offset`, or None where no valid one is."""
    body = offset + OVERHEAD_BYTES
    if body > len(data):
        return None
    mark, kind, length, batch, index, term = _HEAD.unpack_from(data, offset)
    if mark != MARK or kind not in (ENTRY, CUT, VOTE, BASE) or length > MAX_PAYLOAD_BYTES:
        return None
    end = body + length
    if end > len(data):
        return None
    payload = data[body:end]
    crc = zlib.crc32(payload, zlib.crc32(data[offset : offset + _HEAD.size]))
    if crc != _CRC.unpack_from(data, body - _CRC.size)[0]:
        return None
    return Record(kind, batch, index, term, payload, end)


def recover(data: bytes, path: str) -> Recovered:
    """Read a journal file; raises LogDamaged with the file and offset.

    Only what follows a torn write is dropped, and `torn_bytes` says how much.
    """
    if not data.startswith(MAGIC):
        raise LogDamaged("the journal does not begin as one", path, 0)
    state = Recovered(end=len(MAGIC))
    while (record := decode(data, state.end)) is not None:
        if record.batch > state.end:
            raise LogDamaged("a record is not where it was written", path, state.end)
        _replay(state, record, path)
        state.end = record.end
    rest = data[state.end :].rstrip(b"\0")
    if state.end < state.base or state.base == 0:
        raise LogDamaged("a record is damaged", path, state.end)
    if rest:
        _check_torn(data, state, path)
        state.torn_bytes = len(rest)
    return state


def encode_file(term: int, vote: str | None, entries: list[Entry]) -> bytes:
    """A whole file: its magic, its BASE record, the vote, the entries; one batch from 0."""
    content = encode_vote(0, term, vote) + b"".join(encode_entry(0, entry) for entry in entries)
    base = len(MAGIC) + OVERHEAD_BYTES + len(content)
    return MAGIC + encode(BASE, 0, base, 0, b"") + content


def _replay(state: Recovered, record: Record, path: str) -> None:
    if record.kind == BASE:
        if state.end != len(MAGIC):
            raise LogDamaged("the journal begins twice", path, state.end)
        state.base = record.index
        return
    if record.kind == VOTE:
        if record.term < state.term:
            raise LogDamaged("the journal's term goes back", path, state.end)
        state.term, state.vote = record.term, record.payload.decode() or None
        return
    entries = state.entries
    if record.kind == CUT:
        if not entries or not entries[0].index < record.index <= entries[-1].index:
            raise LogDamaged(f"the journal cuts at {record.index}", path, state.end)
        del entries[record.index - entries[0].index :]
        return
    if entries and (record.index != entries[-1].index + 1 or record.term < entries[-1].term):
        raise LogDamaged(
            f"entry {record.index} of term {record.term} follows entry "
            f"{entries[-1].index} of term {entries[-1].term}",
            path,
            state.end,
        )
    entries.append(Entry(record.payload, record.index, record.term))


def _check_torn(data: bytes, state: Recovered, path: str) -> None:
    """Raise if anything valid behind the damage was written after what is damaged."""
    offset = data.find(_MARK_BYTES, state.end + 1)
    while offset >= 0:
        record = decode(data, offset)
        if record is not None and record.batch > state.end:
            raise LogDamaged("a record is damaged, with valid ones behind it", path, state.end)
        offset = data.find(_MARK_BYTES, offset + 1 if record is None else record.end)
