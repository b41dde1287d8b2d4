"""The agent's door by itself: what comes through it whole, and who is sent away, and when."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from reconciler.edge.certificates import create_ca, issue
from reconciler.executor.agent import door, visitor
from reconciler.executor.agent.authority import Refusal, fetch_cluster_key
from reconciler.executor.agent.door import Door, server_context
from tests.door.cluster import HOST, Cluster, closing, free_port, until
from tests.door.flood import GARBAGE, hello

CA = create_ca()
NODE = issue(CA, "node-1", (HOST,))


class Behind:
    """A door with a server behind it that sends back what it hears, or only talks."""

    def __init__(self, folder: Path) -> None:
        self.known = {"node-1", "node-2"}
        self.door = Door(lambda name: name in self.known, lambda: ["127.0.0.9"])
        self.port = free_port()
        self.path = folder / "behind.sock"
        self.talks = 0
        self.peers: list[str] = []
        self.server: asyncio.Server | None = None

    async def start(self) -> None:
        self.server = await asyncio.start_unix_server(self._serve, self.path)
        self.door.show(NODE.ca_pem, NODE.cert_pem, NODE.key_pem)
        self.door.open(f"{HOST}:{self.port}", self.path)

    async def stop(self) -> None:
        await self.door.close()
        assert self.server is not None
        self.server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        self.peers.append(self.door.name_of(f"unix-abstract:{peer[1:].decode()}"))
        try:
            while piece := await reader.read(65_536):
                writer.write(piece)
                await writer.drain()
        finally:
            writer.transport.abort()

    async def dial(
        self, name: str = "node-2", ca: object = CA
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        identity = issue(ca, name, (HOST,))  # type: ignore[arg-type]  # an Authority
        context = ssl.create_default_context(cadata=NODE.ca_pem.decode())
        context.set_alpn_protocols(["h2"])
        pair = self.path.with_name(f"{name}.pem")
        pair.write_bytes(identity.cert_pem + identity.key_pem)
        context.load_cert_chain(pair)
        return await asyncio.open_connection(
            HOST, self.port, ssl=context, server_hostname="node-1")


@pytest.fixture
async def behind(tmp_path: Path) -> AsyncIterator[Behind]:
    it = Behind(tmp_path)
    await it.start()
    yield it
    await it.stop()


def raw(port: int, source: str = "127.0.0.2") -> socket.socket:
    return socket.create_connection((HOST, port), 10, (source, 0))


async def test_every_byte_comes_through_in_order_also_to_a_slow_reader(behind: Behind) -> None:
    reader, writer = await behind.dial()
    sent = os.urandom(1 << 20) * 24

    async def send() -> None:
        for at in range(0, len(sent), 1 << 20):
            writer.write(sent[at : at + (1 << 20)])
            await writer.drain()

    sending = asyncio.create_task(send())
    heard = bytearray()
    async with asyncio.timeout(60):
        while len(heard) < len(sent):
            piece = await reader.read(30_000)
            assert piece
            heard += piece
            await asyncio.sleep(0)
    assert heard == sent
    await sending
    assert behind.peers == ["node-2"]
    writer.transport.abort()


async def test_what_nobody_reads_is_held_back_not_heaped_up(behind: Behind) -> None:
    """The server echoes; a peer that sends and never reads is stopped by full buffers."""
    _, writer = await behind.dial()
    before = _rss_mib()

    async def send() -> None:
        for _ in range(400):
            writer.write(bytes(1 << 20))
            await writer.drain()

    sending = asyncio.create_task(send())
    assert not (await asyncio.wait({sending}, timeout=3.0))[0]
    sending.cancel()
    assert _rss_mib() - before < 100
    writer.transport.abort()


def _rss_mib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


async def test_an_end_on_either_side_ends_the_other(behind: Behind) -> None:
    _, writer = await behind.dial()
    await until(lambda: behind.peers, "it is in")
    writer.transport.abort()
    await until(lambda: not behind.door._guests, "it is gone")
    reader, writer = await behind.dial()
    await until(lambda: behind.door._guests, "it is in again")
    behind.known.clear()
    async with asyncio.timeout(30):
        assert await reader.read() == b""
    writer.transport.abort()


@pytest.mark.parametrize("what", ["garbage", "huge record", "pickle", "TLS alert"])
async def test_what_is_no_hello_of_tls_is_closed_at_once(behind: Behind, what: str) -> None:
    sent = {"garbage": GARBAGE, "huge record": b"\x16\x03\x01\xff\xff" + bytes(100),
            "pickle": b"\x80\x04\x95", "TLS alert": b"\x15\x03\x01\x00\x02\x01\x00"}[what]
    with closing([raw(behind.port)]) as (stranger,):
        stranger.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(stranger, sent)
        async with asyncio.timeout(visitor.HANDSHAKE_S - 1):  # before any deadline
            assert await _ended(stranger)


async def _ended(stranger: socket.socket) -> bool:
    loop = asyncio.get_running_loop()
    try:
        while await loop.sock_recv(stranger, 4096):
            pass
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize("begin", [b"", hello()[:50], hello()], ids=["silent", "half", "hello"])
async def test_a_handshake_that_does_not_end_is_ended(
    behind: Behind, begin: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visitor, "HANDSHAKE_S", 0.5)
    with closing([raw(behind.port)]) as (stranger,):
        stranger.setblocking(False)
        await asyncio.get_running_loop().sock_sendall(stranger, begin)
        await until(lambda: behind.door._strangers, "it stands in the door")
        async with asyncio.timeout(60):
            assert await _ended(stranger)
        assert not behind.door._strangers


async def test_one_byte_now_and_then_does_not_buy_time(
    behind: Behind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visitor, "HANDSHAKE_S", 1.0)
    loop = asyncio.get_running_loop()
    with closing([raw(behind.port)]) as (stranger,):
        stranger.setblocking(False)
        ended = asyncio.create_task(_ended(stranger))
        begun = loop.time()
        for byte in hello():
            try:
                await loop.sock_sendall(stranger, bytes([byte]))
            except OSError:
                break
            if (await asyncio.wait({ended}, timeout=0.05))[0]:
                break
        assert ended.done()
        assert loop.time() - begun >= 0.9  # not for what it sent: its time was over
        await ended


async def test_a_full_door_turns_away_the_crowd_and_never_a_nodes_address(
    behind: Behind,
) -> None:
    near = raw(behind.port, "127.0.0.9")
    await until(lambda: behind.door._strangers, "it stands in the door")
    crowd = [await asyncio.to_thread(raw, behind.port) for _ in range(2 * door.MAX_STRANGERS)]
    with closing([near, *crowd]):
        await until(lambda: behind.door._refused or behind.door._last_refused, "refusals")
        await until(lambda: len(behind.door._strangers) == door.MAX_STRANGERS, "a full door")
        assert next(iter(behind.door._strangers)).source == "127.0.0.9"
        # And a node comes in all the same.
        async with asyncio.timeout(30):
            reader, writer = await behind.dial()
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
        writer.transport.abort()


@pytest.fixture
def few_files() -> Iterator[None]:
    """The process may open some tens of files more, and then no more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 40, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def test_where_no_file_can_be_opened_the_door_shuts_for_a_moment_and_opens_again(
    behind: Behind, few_files: None
) -> None:
    crowd: list[socket.socket] = []
    with closing(crowd):
        try:
            while True:
                crowd.append(raw(behind.port))
        except OSError:
            pass
        behind.door._accept()  # with no descriptor left it must neither raise nor spin
    async with asyncio.timeout(60):
        while True:
            try:
                reader, writer = await behind.dial()
                break
            except OSError:
                await asyncio.sleep(0.1)
        writer.write(b"again")
        assert await reader.readexactly(5) == b"again"
    writer.transport.abort()


async def test_one_node_has_so_many_connections_and_no_more(
    behind: Behind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "MAX_OF_ONE", 2)
    kept = [await behind.dial() for _ in range(2)]
    await until(lambda: len(behind.peers) == 2, "both are in")
    reader, writer = await behind.dial()
    async with asyncio.timeout(30):
        assert await reader.read() == b""
    other = await behind.dial("node-1")
    other[1].write(b"x")
    assert await other[0].readexactly(1) == b"x"
    for _, each in (*kept, other, (reader, writer)):
        each.transport.abort()


async def test_the_socket_of_an_agent_that_was_killed_is_no_hindrance(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "agent.sock"))
    it = Cluster(tmp_path)
    agent = await it.add("node-1")
    await agent.server.stop()
    i = agent.identity.identity
    await agent.server.start(agent.address, i.ca_pem, i.cert_pem, i.key_pem,
                             tmp_path / "agent.sock")
    try:
        # Refused in words, so it was heard.
        with pytest.raises(Refusal):
            await fetch_cluster_key(agent.address, "node-1", agent.credentials)
    finally:
        await agent.server.stop()


def test_older_tls_is_not_spoken() -> None:
    context = server_context(NODE.ca_pem, NODE.cert_pem, NODE.key_pem)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_3
    assert context.verify_mode == ssl.CERT_REQUIRED
