"""Where connections wait before they have asked anything: bounded in number and in time.

asyncio takes every connection there is, and its TLS a quarter of a MiB for each before the first
byte has come. So a connection is held here, as a socket and nothing more, until it has sent what a
client begins with.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Coroutine

import structlog

log = structlog.get_logger("mill.porch")

MAX_STRANGERS = 1024
"""Sockets that have not begun. Past that, one goes for each that comes."""
MAX_HANDSHAKES = 256
"""Likewise of TLS: 64 MiB."""
BEGIN_S = 10.0
"""For the first bytes and the TLS handshake."""
ACCEPTS_PER_TURN = 16
CROWDED_S = 0.01
"""The pause between two turns while every place is taken: at most 1,600 come in a second."""
NO_DESCRIPTOR_S = 0.5
BACKLOG = 1024
TLS_HEAD_BYTES = 5
MAX_RECORD_BYTES = 16 << 10


class Stranger:
    """A socket that has said nothing that counts yet."""

    def __init__(self, raw: socket.socket, source: str) -> None:
        self.raw = raw
        self.source = source

    def shut(self) -> None:
        """Both ways; whoever holds it finds out and closes it."""
        with contextlib.suppress(OSError):
            self.raw.shutdown(socket.SHUT_RDWR)


class Porch:
    """Accepts on `sock` and hands over to protocols of `make`, behind TLS where there is `tls`.

    In place of asyncio's Server, as uvicorn uses that.
    """

    def __init__(
        self, sock: socket.socket, tls: ssl.SSLContext | None,
        make: Callable[[], asyncio.Protocol],
    ) -> None:
        self._sock, self._tls, self._make = sock, tls, make
        self._strangers: dict[Stranger, None] = {}  # in the order in which they came
        self._handshakes: dict[Stranger, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = True
        sock.setblocking(False)
        sock.listen(BACKLOG)
        self._watch()

    def close(self) -> None:
        """Accept no more, and let go of strangers."""
        if self._open:
            self._open = False
            asyncio.get_running_loop().remove_reader(self._sock.fileno())
            self._sock.close()
            for task in self._tasks:
                task.cancel()

    async def wait_closed(self) -> None:
        """After `close`."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _watch(self) -> None:
        if self._open:
            asyncio.get_running_loop().add_reader(self._sock.fileno(), self._accept)

    def _pause(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._sock.fileno())
        loop.call_later(seconds, self._watch)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                raw, address = self._sock.accept()
            except (BlockingIOError, ConnectionError):
                return
            except OSError as error:
                log.warning("api_shut", reason=error.strerror, for_s=NO_DESCRIPTOR_S)
                self._pause(NO_DESCRIPTOR_S)
                return
            raw.setblocking(False)
            if len(self._strangers) >= MAX_STRANGERS:
                _turn_one_away(self._strangers)
            stranger = Stranger(raw, str(address[0]))
            self._strangers[stranger] = None
            self._go(self._let_in(stranger))
        if len(self._strangers) >= MAX_STRANGERS:
            self._pause(CROWDED_S)

    def _go(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _let_in(self, stranger: Stranger) -> None:
        loop = asyncio.get_running_loop()
        taken = False
        try:
            async with asyncio.timeout(BEGIN_S):
                await _begun(stranger.raw, tls=self._tls is not None)
                del self._strangers[stranger]
                if self._tls is not None:
                    if len(self._handshakes) >= MAX_HANDSHAKES:
                        _turn_one_away(self._handshakes)
                    self._handshakes[stranger] = None
                await loop.connect_accepted_socket(
                    self._make, stranger.raw, ssl=self._tls,
                    ssl_handshake_timeout=BEGIN_S if self._tls is not None else None)
                taken = True
        except (KeyError, OSError, TimeoutError):  # KeyError: it was turned away just now
            return  # it went away, spoke no TLS, or took too long: a flood is not worth a line each
        finally:
            self._strangers.pop(stranger, None)
            self._handshakes.pop(stranger, None)
            if not taken:
                stranger.raw.close()


def _turn_one_away(some: dict[Stranger, None]) -> None:
    """The oldest of the address with the most, so that a flood turns itself away."""
    crowd = Counter(each.source for each in some)
    victim = min(some, key=lambda each: -crowd[each.source])
    del some[victim]
    victim.shut()


async def _begun(raw: socket.socket, *, tls: bool) -> None:
    """Return once the client's first byte is there, or its whole first record of TLS (RFC 8446,
    section 5.1). ConnectionAbortedError where it ended before, or is none."""
    least = TLS_HEAD_BYTES if tls else 1
    while True:
        # The kernel says that there is something to read once there is that much of it.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
        await _readable(raw)
        begin = raw.recv(least, socket.MSG_PEEK)
        if len(begin) < least or (tls and begin[0] != 0x16):
            raise ConnectionAbortedError("not the beginning of a client")
        if not tls or least > TLS_HEAD_BYTES:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            return
        least += int.from_bytes(begin[3:5], "big")
        if least > TLS_HEAD_BYTES + MAX_RECORD_BYTES:
            raise ConnectionAbortedError("a first record that is too long")


async def _readable(raw: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(raw.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(raw.fileno())
