"""Bytes of the log and of snapshots: msgpack behind a version byte."""

from __future__ import annotations

import msgspec

from reconciler.errors import MillError
from reconciler.fsm.commands import AnyCommand
from reconciler.fsm.state import State

VERSION = 1
MAX_COMMAND_BYTES = 512 * 1024
"""The bound of a log entry: well under a transport frame (4 MiB), see the facts of the log."""


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One log entry: the leader's wall clock when it decided (ms), and the command."""

    at_ms: int
    command: AnyCommand


class Undecodable(MillError):
    """The bytes are not a command that this version knows."""


_entry = msgspec.msgpack.Decoder(Entry)
_state = msgspec.msgpack.Decoder(State)
_encoder = msgspec.msgpack.Encoder()


def encode_entry(entry: Entry) -> bytes:
    """A log entry's bytes."""
    return bytes([VERSION]) + _encoder.encode(entry)


def decode_entry(data: bytes) -> Entry:
    """The entry; Undecodable names the version or the command number that is not known."""
    if not data or data[0] != VERSION:
        raise Undecodable(f"log entry of format {data[0] if data else 'nothing'}",
                          hint="a newer mill wrote it: upgrade this node")
    try:
        return _entry.decode(memoryview(data)[1:])
    except msgspec.DecodeError as error:
        raise Undecodable(f"log entry cannot be read: {error}",
                          hint="a newer mill wrote it: upgrade this node") from error


def encode_state(state: State) -> bytes:
    """A snapshot's bytes."""
    return bytes([VERSION]) + _encoder.encode(state)


def decode_state(data: bytes) -> State:
    """The state of a snapshot; Undecodable where it is of another format."""
    if not data or data[0] != VERSION:
        raise Undecodable("snapshot of an unknown format", hint="upgrade this node")
    try:
        return _state.decode(memoryview(data)[1:])
    except msgspec.DecodeError as error:
        raise Undecodable(f"snapshot cannot be read: {error}") from error
