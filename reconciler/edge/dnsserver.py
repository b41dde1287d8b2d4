"""The DNS process: one a node, so that its answers do not wait for the node's own work.

It outlives the node's process and keeps the last zone while nobody feeds it; nothing is on disk.
The sockets are made in their network namespaces, the process stays in the host's. Its config
comes on standard input as JSON (`Config`); zones come over the unix socket `FOLDER/.dns`, as
frames of a 4-byte length and msgpack (see `dns_feed.py`).
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import resource
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import assert_never, cast

import msgspec

from reconciler.edge.dns import DROPPED, Authority, Zone
from reconciler.edge.dns_forward import Forwarder

CONTROL, LOCK, TROUBLE = ".dns", ".dns.lock", ".dns.trouble"
FRAME_BYTES = 64 * 1024 * 1024  # a zone of 100,000 names is a tenth of it
CONNECTIONS = 256  # over TCP, at once
IDLE_S = 10.0
TROUBLE_BYTES = 1024 * 1024  # the only file that it writes; Python ignores the signal for more
_CLONE_NEWNET = 0x40000000
_Asker = tuple[str, int]


class Listener(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An address and port, UDP and TCP; `netns` is a namespace's path, None the host's."""

    address: str
    port: int
    netns: str | None = None


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a DNS process serves for its lifetime; `fingerprint` tells a feeder which it is.

    upstreams: `IP` or `IP:PORT`; none: those of the host's resolv.conf.
    """

    folder: str
    fingerprint: str
    listeners: tuple[Listener, ...]
    upstreams: tuple[str, ...] = ()


class NotBound(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why the process did not start, as JSON on standard error."""

    listener: Listener
    reason: str


class Hello(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """What the process says first."""

    fingerprint: str


class Ack(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The zone of `index` answers from now on."""

    index: int


class Publish(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The whole zone as of the log's `index`; it replaces the one before."""

    index: int
    zone: Zone


class Stop(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """End."""


def framed(message: Hello | Ack | Publish | Stop) -> bytes:
    """A message as it goes over the unix socket."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(4) + body


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """The next message's bytes. Errors: IncompleteReadError at the end, ValueError if too long."""
    length = int.from_bytes(await reader.readexactly(4))
    if length > FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes")
    return await reader.readexactly(length)


class Server:
    """Answers on all listeners from the newest zone, and takes zones from feeders."""

    def __init__(self, config: Config) -> None:
        own = frozenset((listener.address, listener.port) for listener in config.listeners)
        self._fingerprint = config.fingerprint
        self._forwarder = Forwarder(config.upstreams, own)
        self._authority = Authority(None, 0)
        self._forwarding: set[asyncio.Task[None]] = set()
        self._connections = 0
        self._stopped = asyncio.Event()

    async def serve(
        self, control: socket.socket, udp: list[socket.socket], tcp: list[socket.socket]
    ) -> None:
        """Until a feeder says stop."""
        loop = asyncio.get_running_loop()
        serving: list[asyncio.Server] = []
        for datagrams in udp:
            await loop.create_datagram_endpoint(lambda: _Datagrams(self), sock=datagrams)
        for streams in tcp:
            serving.append(await asyncio.start_server(self._stream, sock=streams))
        serving.append(await asyncio.start_unix_server(self._feed, sock=control))
        await self._stopped.wait()
        for server in serving:
            server.close()

    def datagram(self, query: bytes, asker: _Asker, transport: asyncio.DatagramTransport) -> None:
        """Answer one query over UDP, at once or when its upstream has."""
        wire = self._authority.answer(query, tcp=False)
        if wire is None:
            task = asyncio.ensure_future(self._forward_datagram(query, asker, transport))
            self._forwarding.add(task)
            task.add_done_callback(self._forwarding.discard)
        elif wire != DROPPED:
            transport.sendto(wire, asker)

    async def _forward_datagram(
        self, query: bytes, asker: _Asker, transport: asyncio.DatagramTransport
    ) -> None:
        transport.sendto(await self._forwarder.ask(query, tcp=False), asker)

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection's queries in turn (RFC 7766)."""
        self._connections += 1
        try:
            while self._connections <= CONNECTIONS:
                async with asyncio.timeout(IDLE_S):
                    query = await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
                    wire = self._authority.answer(query, tcp=True)
                    if wire is None:
                        wire = await self._forwarder.ask(query, tcp=True)
                    if wire == DROPPED:
                        return
                    writer.write(len(wire).to_bytes(2) + wire)
                    await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # gone or silent: both end a connection
        finally:
            self._connections -= 1
            writer.close()

    async def _feed(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(framed(Hello(self._fingerprint)))
            while not self._stopped.is_set():
                self._obey(await read_frame(reader), writer)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass  # the feeder went away; the zone stays
        except (ValueError, msgspec.MsgspecError) as error:
            sys.stderr.write(f"feeder: {error}\n")
        finally:
            writer.close()

    def _obey(self, frame: bytes, writer: asyncio.StreamWriter) -> None:
        message: Publish | Stop = msgspec.msgpack.decode(frame, type=Publish | Stop)
        match message:
            case Publish(index, zone):
                self._authority = Authority(zone, index)
                writer.write(framed(Ack(index)))
            case Stop():
                self._stopped.set()
            case _:
                assert_never(message)


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, server: Server) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)  # it only quacks like one

    def datagram_received(self, data: bytes, addr: _Asker) -> None:
        self._server.datagram(data, addr, self._transport)


def main() -> int:
    """Start detached: returns 0 in the first process once the second's sockets are bound.

    Also 0 where one runs in this folder already; 1 with a NotBound on standard error.
    """
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=Config)
    folder = Path(config.folder)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0
    udp, tcp = [], []
    for listener in config.listeners:
        try:
            bound = _bound(listener)
        except OSError as error:
            sys.stderr.buffer.write(msgspec.json.encode(NotBound(listener, _reason(error))))
            return 1
        udp.append(bound[0])
        tcp.append(bound[1])
    control = _control(folder)
    if os.fork():
        os._exit(0)  # the lock and the sockets live on in the child
    _leave_the_terminal(folder)
    asyncio.run(Server(config).serve(control, udp, tcp))
    return 0


def _bound(listener: Listener) -> tuple[socket.socket, socket.socket]:
    datagrams = _socket_in(listener.netns, socket.SOCK_DGRAM)
    streams = _socket_in(listener.netns, socket.SOCK_STREAM)
    streams.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for bound in (datagrams, streams):
        bound.bind((listener.address, listener.port))
        bound.setblocking(False)
    streams.listen(128)
    return datagrams, streams


def _socket_in(netns: str | None, kind: int) -> socket.socket:
    """A socket made by a short-lived thread in the namespace; it stays there for good."""
    if netns is None:
        return socket.socket(socket.AF_INET, kind)

    def make() -> socket.socket:
        namespace = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "cannot enter the network namespace")
        finally:
            os.close(namespace)
        return socket.socket(socket.AF_INET, kind)

    with ThreadPoolExecutor(1) as thread:  # a thread that has entered must not be used again
        return thread.submit(make).result()


def _reason(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    return (error.strerror or str(error)) + where


def _control(folder: Path) -> socket.socket:
    """The unix socket, bound through `/proc/self/fd`: its path may be longer than 107 bytes."""
    with suppress(FileNotFoundError):
        (folder / CONTROL).unlink()
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    home = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        control.bind(f"/proc/self/fd/{home}/{CONTROL}")
    finally:
        os.close(home)
    control.listen(16)
    control.setblocking(False)
    return control


def _leave_the_terminal(folder: Path) -> None:
    os.setsid()
    os.chdir(folder)  # tells in /proc which folder this one serves; the command line does not
    nothing = os.open(os.devnull, os.O_RDWR)
    resource.setrlimit(resource.RLIMIT_FSIZE, (TROUBLE_BYTES, TROUBLE_BYTES))
    trouble = os.open(folder / TROUBLE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for source, target in ((nothing, 0), (nothing, 1), (trouble, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(trouble)


if __name__ == "__main__":
    sys.exit(main())
