"""uvicorn as a node needs it: signals are not its business, and whoever connects and says nothing
holds nothing up."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator
from typing import cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from reconciler.api.porch import Porch

SILENCE_S = 30.0
"""For the head of a request, which no honest caller takes a second for."""
MAX_CONNECTIONS = 4_096
"""Streams included; a node has a few thousand files to open. Past it a request is 503."""
MAX_SILENT = MAX_CONNECTIONS // 2
"""Past so many connections, each new one takes the place of the one that has been silent longest:
ten thousand that say nothing take nobody's place who does."""


class Listening(uvicorn.Server):
    """Says when it accepts connections, and stops when told."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()
        self.silent: dict[Connection, None] = {}
        self._leaving = asyncio.Event()

    def leave(self) -> None:
        """Accept no more, and end."""
        self.should_exit = True
        self._leaving.set()

    async def main_loop(self) -> None:
        """Until told to leave. A tick of ten refreshes the Date header; uvicorn's own loop wakes
        ten times as often."""
        ticks = 0
        while not await self.on_tick(ticks):
            ticks += 10
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._leaving.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave them alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, with a deadline for handshakes."""
        await self.lifespan.startup()
        porches = [Porch(sock, self.config.ssl, self._connection) for sock in sockets or ()]
        self.servers = cast("list[asyncio.Server]", porches)  # all uvicorn does to them is close
        self.started = True
        self.ready.set()

    def _connection(self) -> Connection:
        return Connection(self)


class Connection(H11Protocol):
    """A connection that is closed where the head of a request does not come."""

    def __init__(self, server: Listening) -> None:
        super().__init__(server.config, server.server_state, server.lifespan.state)
        self._silent = server.silent
        self._look: asyncio.TimerHandle | None = None
        self._seen: object = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """From now on it is expected to speak."""
        super().connection_made(transport)
        if len(self.connections) > MAX_SILENT:
            self._displace()
        self._silent[self] = None
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Silence ends with a request's whole head, not with its first byte."""
        super().data_received(data)
        if self.cycle is not None:
            self._silent.pop(self, None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more is expected of it."""
        self._silent.pop(self, None)
        if self._look is not None:
            self._look.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._seen = self.cycle
        self._look = self.loop.call_later(SILENCE_S, self._looked)

    def _looked(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is self._seen:
            self.transport.abort()
        else:
            self._wait()

    def _displace(self) -> None:
        oldest = next(iter(self._silent), None)
        if oldest is not None:
            del self._silent[oldest]
            oldest.transport.abort()
