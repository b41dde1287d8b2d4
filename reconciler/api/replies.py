"""Answers on their way out: JSON from structs, and streams that end when their reader does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import TypeVar

import msgspec
from msgspec import UNSET, UnsetType
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from reconciler.api.calls import Asked
from reconciler.api.stream import kept_open

A = TypeVar("A", bound=msgspec.Struct)

EVENT_STREAM = "text/event-stream"
_STREAM_HEADERS = {
    "content-type": EVENT_STREAM,
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx in front would hold events back
}


def json(
    answer: msgspec.Struct, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A struct as a JSON answer; never cached, because the next index may differ."""
    return Response(msgspec.json.encode(answer), status,
                    {"cache-control": "no-store", **(headers or {})},
                    media_type="application/json")


def stale(asked: Asked) -> bool | UnsetType:
    """The `stale` field of an answer: true, or not there."""
    return True if asked.stale else UNSET


def events(
    asked: Asked, frames: AsyncGenerator[bytes, None], headers: Mapping[str, str] | None = None
) -> Response:
    """A stream of events that is kept open by comments and ends with its server."""
    site = asked.site
    return Streamed(kept_open(frames, site.closing, site.heartbeat_s), 200,
                    {**_STREAM_HEADERS, **(headers or {})})


def rfc3339(ms: int) -> str:
    """`2026-01-31T08:15:30.250Z`."""
    moment = datetime.fromtimestamp(ms / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def rfc3339_or_none(ms: int | None) -> str | None:
    """The time, or None for 0, which records use where it has not happened."""
    return rfc3339(ms) if ms else None


class Streamed(StreamingResponse):
    """A streaming response that lets go of what it holds at once, however it ends.

    `release` is called even where the reader is gone before the first piece.
    """

    body_iterator: AsyncGenerator[bytes, None]

    def __init__(
        self, frames: AsyncGenerator[bytes, None], status: int, headers: Mapping[str, str],
        release: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(frames, status, headers)
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end or until the reader is gone.

        Not starlette's own way: its cancel scope would cancel each await of the cleaning up too.
        """
        sending = asyncio.create_task(self.stream_response(send))
        gone = asyncio.create_task(self.listen_for_disconnect(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            sending.cancel()
            gone.cancel()
            await asyncio.wait({sending, gone})
        if not sending.cancelled():
            sending.result()

    async def stream_response(self, send: Send) -> None:
        """Send all, then let go of what the generator holds."""
        try:
            await super().stream_response(send)
        finally:
            await self.body_iterator.aclose()
            if self._release is not None:
                await self._release()
