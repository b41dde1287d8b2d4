"""What the log's nodes say to each other: a closed set of typed messages in msgpack.

Decoding checks every type and length, so nothing behind it has to guard against a frame
that is well-formed and wrong.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from reconciler.log.records import Entry
from reconciler.log.settings import Membership

MAX_COMMAND_BYTES = 4 << 20  # twice the API's largest body
BATCH_BYTES = 1 << 20  # of entries in one message; a larger entry goes alone
CHUNK_BYTES = 256 << 10  # of a snapshot in one message
MAX_FRAME_BYTES = MAX_COMMAND_BYTES + BATCH_BYTES

Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    term: Count


class RequestVote(_Message, frozen=True, tag=1):
    """Vote for me in `term`; my log ends there."""

    last_index: Count
    last_term: Count


class Vote(_Message, frozen=True, tag=2):
    """You have my vote in `term`; it is on my disk."""


class TimeoutNow(_Message, frozen=True, tag=3):
    """I resign: begin an election at once."""


class Append(_Message, frozen=True, tag=4):
    """The leader's heartbeat, with entries behind (`prev_index`, `prev_term`).

    `number` counts what this leader sent; the answer repeats it (read index). 0 announces a
    commit and is answered only where it does not fit.
    """

    number: Count
    commit: Count
    prev_index: Count
    prev_term: Count
    entries: list[Entry]


class Ack(_Message, frozen=True, tag=5):
    """The answer to `number`, once it is on disk.

    success: all below `next_index` is as the leader has it. reset: it does not fit;
    go on from `next_index`. Neither: a part of a snapshot arrived.
    """

    number: Count
    next_index: Count
    success: bool
    reset: bool


class Chunk(_Message, frozen=True, tag=6):
    """A part of the snapshot file of `size` bytes that ends at (`index`, `last_term`)."""

    number: Count
    index: Count
    last_term: Count
    size: Count
    offset: Count
    data: bytes


class PreVote(_Message, frozen=True, tag=7):
    """Would you vote for me in `term`? Changes nothing."""

    last_index: Count
    last_term: Count


class PreVoteReply(_Message, frozen=True, tag=8):
    """Yes or no to `term`; `current` is the answerer's own term, 0 while it hears a leader."""

    granted: bool
    current: Count


class HigherTerm(_Message, frozen=True, tag=9):
    """What you sent is of an older term than mine."""


class AskTerm(_Message, frozen=True, tag=10):
    """I lost my disk, or hear no leader: which term are you in, and who are the members?

    `number` comes back in the answer.
    """

    number: Count


class TermIs(_Message, frozen=True, tag=11):
    """The answerer's term, which is on its disk, and the members as its log has them."""

    number: Count
    membership: Membership


Message = (
    RequestVote | Vote | TimeoutNow | Append | Ack | Chunk | PreVote | PreVoteReply | HigherTerm
    | AskTerm | TermIs
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """One message, at most MAX_FRAME_BYTES."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> Message:
    """Read one message; raises msgspec.DecodeError for anything else."""
    return _decoder.decode(data)
