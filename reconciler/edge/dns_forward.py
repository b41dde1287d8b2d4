"""Names outside `.mill`: one question on to the host's own name servers, one answer back."""

from __future__ import annotations

import asyncio
import os
import random
import time
from contextlib import suppress
from pathlib import Path

from reconciler.edge.dns import servfail

RESOLV_CONF = Path("/etc/resolv.conf")
DEADLINE_S = 2.0  # over all name servers together; the asker's own patience is 5 s
IN_FLIGHT = 1000  # a socket each
_REREAD_S = 5.0
_NAMESERVERS = 3  # resolv.conf(5) MAXNS
_random = random.SystemRandom()

Address = tuple[str, int]


class Forwarder:
    """Asks `configured` name servers (`IP` or `IP:PORT`), by default those of resolv.conf.

    `own` are addresses where we listen ourselves: never asked, or a query would go in circles.
    """

    def __init__(self, configured: tuple[str, ...], own: frozenset[Address]) -> None:
        self._own = own
        self._configured = tuple(_address(text) for text in configured)
        self._read: tuple[Address, ...] = ()
        self._read_at = -_REREAD_S
        self._in_flight = 0

    async def ask(self, query: bytes, tcp: bool) -> bytes:
        """The answer in wire form; SERVFAIL where none came within DEADLINE_S."""
        servers = [server for server in self._servers() if server not in self._own]
        if not servers or self._in_flight >= IN_FLIGHT:
            return servfail(query)
        self._in_flight += 1
        try:
            for server in servers:
                with suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                    async with asyncio.timeout(DEADLINE_S / len(servers)):
                        return await (_over_tcp if tcp else _over_udp)(server, query)
        finally:
            self._in_flight -= 1
        return servfail(query)

    def _servers(self) -> tuple[Address, ...]:
        """resolv.conf is read again now and then: a laptop changes networks."""
        if self._configured:
            return self._configured
        now = time.monotonic()
        if now - self._read_at >= _REREAD_S:
            self._read_at = now
            with suppress(OSError):
                self._read = parsed(RESOLV_CONF.read_text(errors="replace"))
        return self._read


def parsed(resolv_conf: str) -> tuple[Address, ...]:
    """The name servers of a resolv.conf(5)."""
    rows = (line.split() for line in resolv_conf.splitlines())
    servers = [row[1] for row in rows if len(row) > 1 and row[0] == "nameserver"]
    return tuple((server, 53) for server in servers[:_NAMESERVERS])


def _address(text: str) -> Address:
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        return text, 53
    return host.strip("[]"), int(port)


async def _over_udp(server: Address, query: bytes) -> bytes:
    """From a fresh port under a fresh id, so that an answer is hard to forge (RFC 5452)."""
    ours = os.urandom(2) + query[2:]
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[bytes] = loop.create_future()
    transport, _ = await loop.create_datagram_endpoint(
        lambda: _Reply(ours, answered), local_addr=None, remote_addr=server
    )
    try:
        transport.sendto(ours)
        return query[:2] + (await answered)[2:]
    finally:
        transport.close()


async def _over_tcp(server: Address, query: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*server)
    try:
        writer.write(len(query).to_bytes(2) + query)
        length = int.from_bytes(await reader.readexactly(2))
        return await reader.readexactly(length)
    finally:
        writer.close()


class _Reply(asyncio.DatagramProtocol):
    """Takes the first datagram that answers our question."""

    def __init__(self, query: bytes, answered: asyncio.Future[bytes]) -> None:
        self._query = query
        self._answered = answered

    def datagram_received(self, data: bytes, addr: object) -> None:
        if data[:2] == self._query[:2] and len(data) >= 12 and not self._answered.done():
            self._answered.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self._answered.done():
            self._answered.set_exception(exc)  # refused: the next name server may answer
