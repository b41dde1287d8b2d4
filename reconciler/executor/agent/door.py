"""The door of a port: TLS with certificates on both sides, and bounds on who may stand in it.

gRPC by itself takes every connection and holds it for as long as the handshake may take, or, with
its own bound, turns members away while strangers fill it. So connections are taken here, shown to
be a node's, and passed on to the gRPC server behind: over a socket that only this user reaches,
and whose address says who speaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path

import structlog

from reconciler.executor.agent.visitor import Passage, Visitor

log = structlog.get_logger("mill.door")

MAX_STRANGERS = 256
"""Connections without a finished handshake. Past that, one goes for each that comes."""
MAX_OF_ONE = 256
"""Connections of one node: a session, and each `mill logs -f` that it serves."""
ACCEPTS_PER_TURN = 16
"""So that a flood of connections leaves the loop time for everything else."""
NO_DESCRIPTOR_S = 0.5
"""The pause where the process may open no more files: else the loop would try without end."""
CROWDED_S = 0.01
"""The pause between two turns while strangers stand in every place: at most 1,600 come in a second,
and what waits in the kernel costs nothing."""
SWEEP_S = 1.0
"""How soon a removed node's connections are closed."""
BACKLOG = 512


class Door:
    """Listens on an address for the server behind. `admits` says whether a name is a node's, `near`
    at which IPs nodes are."""

    def __init__(
        self, admits: Callable[[str], bool], near: Callable[[], Collection[str]]
    ) -> None:
        self._admits = admits
        self._near = near
        self._tls: ssl.SSLContext | None = None
        self._behind = ""
        self._listener: socket.socket | None = None
        self._strangers: dict[Visitor, None] = {}  # in the order in which they came
        self._guests: dict[str, Visitor] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._refused, self._last_refused = 0, ""

    def name_of(self, peer: str) -> str:
        """The node that speaks through the connection that gRPC calls `peer`; "" for nobody."""
        guest = self._guests.get(peer.rpartition(":")[2])
        return guest.name if guest is not None else ""

    def show(self, ca: bytes, certificate: bytes, key: bytes) -> None:
        """The certificate (PEM) for handshakes from now on; those who are in stay."""
        self._tls = server_context(ca, certificate, key)

    def open(self, address: str, behind: Path) -> None:
        """Listen on host:port or `unix:PATH`; OSError where it is taken. `show` comes first."""
        assert self._tls is not None, "a door shows its certificate"
        self._behind = str(behind)
        self._listener = _listen(address)
        self._watch()
        self._go(self._sweep())

    async def close(self) -> None:
        """Close the address and every connection."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
        for visitor in (*self._strangers, *self._guests.values()):
            visitor.leave()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # What visitors report.

    def recognized(self, visitor: Visitor) -> None:
        """Its handshake is done."""
        self._strangers.pop(visitor, None)
        if sum(guest.name == visitor.name for guest in self._guests.values()) >= MAX_OF_ONE:
            log.warning("door_full", node=visitor.name, connections=MAX_OF_ONE)
            visitor.leave()
            return
        token = f"mill-door-{secrets.token_hex(16)}"
        self._guests[token] = visitor
        self._go(self._lead_in(visitor, token))

    def refused(self, visitor: Visitor, why: str) -> None:
        """It left before it had a name."""
        if visitor in self._strangers:
            del self._strangers[visitor]
            self._refused += 1
            self._last_refused = f"{visitor.source or 'a local process'}: {why}"

    def _go(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _watch(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    def _pause(self, seconds: float) -> None:
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener.fileno())
        loop.call_later(seconds, self._watch)

    def _accept(self) -> None:
        assert self._listener is not None
        assert self._tls is not None
        for _ in range(ACCEPTS_PER_TURN):
            try:
                raw, address = self._listener.accept()
            except (BlockingIOError, ConnectionError):
                return
            except OSError as error:
                log.warning("door_shut", reason=error.strerror, for_s=NO_DESCRIPTOR_S)
                self._pause(NO_DESCRIPTOR_S)
                return
            if len(self._strangers) >= MAX_STRANGERS:
                self._turn_one_away()
            visitor = Visitor(self, self._tls, str(address[0]) if address else "")
            self._strangers[visitor] = None
            self._go(_take_up(raw, visitor))
        if len(self._strangers) >= MAX_STRANGERS:
            self._pause(CROWDED_S)

    def _turn_one_away(self) -> None:
        """One who does not come from a node's address, then one who has not said hello, then one of
        the address with the most, so that a flood turns itself away; of these the oldest."""
        near, crowd = self._near(), Counter(visitor.source for visitor in self._strangers)
        victim = min(self._strangers, key=lambda visitor: (
            visitor.source in near, visitor.greeted, -crowd[visitor.source]))
        self.refused(victim, "too many at once")
        victim.leave()

    async def _lead_in(self, visitor: Visitor, token: str) -> None:
        """Connect a guest to the server behind, under an address that stands for its name."""
        loop = asyncio.get_running_loop()
        inner = socket.socket(socket.AF_UNIX)
        inner.setblocking(False)
        try:
            inner.bind(f"\0{token}")  # what gRPC will call its peer
            await loop.sock_connect(inner, self._behind)
            passage = Passage(visitor, lambda: self._guests.pop(token, None))
            await loop.create_unix_connection(lambda: passage, sock=inner)
        except OSError as error:
            log.warning("door_blocked", node=visitor.name, reason=str(error))
            inner.close()
            self._guests.pop(token, None)
            visitor.leave()

    async def _sweep(self) -> None:
        """A certificate outlives its node's removal; its connections do not. The first turn after
        it came leaves a newcomer the time to be told why."""
        seen: set[str] = set()
        while True:
            await asyncio.sleep(SWEEP_S)
            if self._refused:  # a line for all of them: a flood must not fill the disk with lines
                log.info("door_refused", connections=self._refused, last=self._last_refused)
                self._refused = 0
            unknown = {t: g for t, g in self._guests.items() if not self._admits(g.name)}
            for token, guest in unknown.items():
                if token in seen:
                    log.warning("door_closed", node=guest.name, why="no node of this cluster")
                    guest.leave()
            seen = set(unknown)


async def _take_up(raw: socket.socket, visitor: Visitor) -> None:
    try:
        raw.setblocking(False)
        if raw.family != socket.AF_UNIX:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().connect_accepted_socket(lambda: visitor, raw)
    except OSError as error:  # it has gone already
        raw.close()
        visitor.connection_lost(error)


def server_context(ca: bytes, certificate: bytes, key: bytes) -> ssl.SSLContext:
    """TLS 1.3 for gRPC (ALPN h2), the other side's certificate required; all in PEM."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0  # each connection shows its certificate anew
    context.load_verify_locations(cadata=ca.decode())
    context.set_alpn_protocols(["h2"])
    # A file in memory, because the ssl module reads certificates from files alone.
    descriptor = os.memfd_create("identity", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(certificate + key)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    return context


def _listen(address: str) -> socket.socket:
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(BACKLOG)
    else:
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, int(port)), family=family, backlog=BACKLOG)
    listener.setblocking(False)
    return listener
