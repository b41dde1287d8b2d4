"""Server-sent events (WHATWG HTML, section 9.2): encoding, decoding, and keeping a stream open.

Shared with the CLI, so nothing here imports a server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import msgspec

T = TypeVar("T")
U = TypeVar("U")

COMMENT = b": keep open\n\n"
MAX_LINE_BYTES = 1024 * 1024
"""The longest line that is read; the longest that is written is a failure's last 20 lines."""


@dataclass(frozen=True)
class Message:
    """One event as it came. `id` is None where it had none; `event` defaults to `message`."""

    id: str | None
    event: str
    data: str


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """The `data:` of a deploy's or a drain's stream as a reader sees it: the fields of all phases,
    those that are not there with their defaults, those of newer versions passed over. Seconds,
    bytes.
    """

    phase: str = ""
    deploy: str = ""
    services: int | None = None
    service: str = ""
    alloc: str = ""
    node: str = ""
    image: str = ""
    bytes: int | None = None
    total: int | None = None
    cached: bool | None = None
    elapsed: float | None = None
    reason: str = ""
    message: str = ""
    success: bool | None = None
    outcome: str = ""
    changed: int | None = None
    logs: tuple[str, ...] = ()
    left: int | None = None


class DeployEvent(msgspec.Struct, frozen=True):
    """One event of a deploy's stream; `id` is None for progress in bytes, `data` as it came."""

    id: int | None
    event: str
    step: Step
    data: str

    @property
    def terminal(self) -> bool:
        """Nothing comes after it."""
        return self.event in ("done", "failed")


class StreamGarbled(ValueError):
    """Not a stream of events: a line is longer than any that is sent."""


def encode(event: str, data: object, id_: int | None = None) -> bytes:
    """One event. JSON never holds a raw line break, so `data` is always one line."""
    head = f"id: {id_}\n" if id_ is not None else ""
    return head.encode() + f"event: {event}\n".encode() + b"data: " \
        + msgspec.json.encode(data) + b"\n\n"


class Decoder:
    """Bytes in any pieces to messages; an unfinished message at the end is dropped."""

    def __init__(self) -> None:
        self._buffer = b""
        self._id: str | None = None
        self._event = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[Message]:
        """The messages that `chunk` completes; StreamGarbled past the bound of a line."""
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        if len(self._buffer) > MAX_LINE_BYTES:
            raise StreamGarbled(f"a line of over {MAX_LINE_BYTES} bytes")
        for raw in lines:
            message = self._line(raw.removesuffix(b"\r").decode(errors="replace"))
            if message is not None:
                yield message

    def _line(self, line: str) -> Message | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "id" if "\0" not in value:
                self._id = value
            case "event":
                self._event = value
            case "data":
                self._data.append(value)
            case _:  # comments (an empty name) and unknown fields are passed over
                pass
        return None

    def _dispatch(self) -> Message | None:
        id_, event, data = self._id, self._event, self._data
        self._id, self._event, self._data = None, "", []
        return Message(id_, event or "message", "\n".join(data)) if data else None


async def kept_open(
    frames: AsyncGenerator[bytes, None], closing: asyncio.Event, every_s: float | None
) -> AsyncGenerator[bytes, None]:
    """`frames`, with a comment after each `every_s` seconds of silence; ends when `closing`."""
    closed = asyncio.ensure_future(closing.wait())
    upcoming: asyncio.Future[bytes] | None = None
    try:
        while True:
            upcoming = upcoming or asyncio.ensure_future(anext(frames))
            waits: set[asyncio.Future[bytes] | asyncio.Future[Literal[True]]] = {upcoming, closed}
            await asyncio.wait(waits, timeout=every_s, return_when=asyncio.FIRST_COMPLETED)
            if upcoming.done():
                try:
                    frame = upcoming.result()
                except StopAsyncIteration:
                    return
                upcoming = None
                yield frame
            elif closed.done():
                return
            else:
                yield COMMENT
    finally:
        await _let_go(closed)
        await _let_go(upcoming)
        await frames.aclose()


async def beside(
    main: AsyncGenerator[T, None], side: AsyncIterator[U]
) -> AsyncGenerator[T | U, None]:
    """Both as they come; `main` first where both are there, and its end ends all."""
    next_main: asyncio.Future[T] | None = None
    next_side: asyncio.Future[U] | None = asyncio.ensure_future(_next(side))
    try:
        while True:
            next_main = next_main or asyncio.ensure_future(anext(main))
            waits: set[asyncio.Future[T] | asyncio.Future[U]] = {next_main}
            if next_side is not None:
                waits.add(next_side)
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if next_main.done():
                try:
                    item = next_main.result()
                except StopAsyncIteration:
                    return
                next_main = None
                yield item
            elif next_side is not None:
                try:
                    extra = next_side.result()
                except StopAsyncIteration:
                    next_side = None
                else:
                    next_side = asyncio.ensure_future(_next(side))
                    yield extra
    finally:
        await _let_go(next_main)
        await _let_go(next_side)
        await main.aclose()
        if isinstance(side, AsyncGenerator):
            await side.aclose()


async def _next(iterator: AsyncIterator[U]) -> U:
    return await anext(iterator)


async def _let_go(future: asyncio.Future[T] | None) -> None:
    """Cancel what is still awaited and see it end, so that its generator may be closed."""
    if future is not None:
        future.cancel()
        await asyncio.wait({future})
        if not future.cancelled():
            future.exception()  # taken note of: nobody else will ask
