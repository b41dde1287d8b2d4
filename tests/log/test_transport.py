"""The log's port against everybody who is not a member, and members gone mad."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import resource
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from reconciler.log import wire
from reconciler.log.poller import EpollPoller
from reconciler.log.replica import Replica
from reconciler.log.transport import TlsTransport
from tests.log.certificates import Authority
from tests.log.cluster import Cluster

LENGTH = struct.Struct("<I")
PICKLE = pickle.dumps({"type": "append_entries"})


class Target:
    """Two running members of three; the third's certificate is in an attacker's hands."""

    def __init__(self, cluster: Cluster, leader: Replica) -> None:
        self.cluster, self.leader = cluster, leader
        me = leader._settings.me
        self.address = (me.host, me.port)
        self.stolen = cluster.authority.issue("node-3")

    async def closes(self, send: bytes, tls: ssl.SSLContext | None) -> bool:
        """Whether the log closes a connection that sends this, without a byte of its own."""
        try:
            async with asyncio.timeout(30):
                reader, writer = await asyncio.open_connection(*self.address, ssl=tls)
                try:
                    writer.write(send)
                    await writer.drain()
                    return await reader.read() == b""
                finally:
                    writer.transport.abort()
        except (OSError, ssl.SSLError):
            return True


@pytest.fixture
async def target(tmp_path: Path) -> AsyncIterator[Target]:
    cluster = Cluster(tmp_path, 3)
    try:
        await cluster.start("node-1", "node-2")
        yield Target(cluster, await cluster.leader())
    finally:
        await cluster.stop()


def client(authority: Authority, files: tuple[Path, Path] | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(authority.file)
    if files is not None:
        context.load_cert_chain(*files)
    return context


async def still_serves(target: Target, term: int) -> bool:
    await target.leader.propose(b"still here")
    return target.leader.term == term and target.leader.is_leader


@pytest.mark.parametrize("who", ["nobody", "another CA", "not a member", "TLS 1.2"])
async def test_a_stranger_is_closed_before_it_is_heard(target: Target, who: str) -> None:
    authority, term = target.cluster.authority, target.leader.term
    match who:
        case "nobody":
            context = client(authority, None)
        case "another CA":
            evil = Authority(target.cluster.folder, "evil")
            context = client(authority, evil.issue("node-3", "evil-node-3"))
        case "not a member":
            context = client(authority, authority.issue("node-9"))
        case _:
            context = client(authority, target.stolen)
            context.maximum_version = ssl.TLSVersion.TLSv1_2
    vote = wire.encode(wire.RequestVote(999, 999, 999))
    assert await target.closes(LENGTH.pack(len(vote)) + vote, context)
    assert await still_serves(target, term)


async def test_a_node_does_not_follow_a_server_with_another_members_name(
    target: Target,
) -> None:
    """Who listens on a member's address must be that member."""
    impostor = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    impostor.load_cert_chain(*target.cluster.authority.issue("node-2", "stolen-node-2"))
    impostor.load_verify_locations(target.cluster.authority.file)
    impostor.verify_mode = ssl.CERT_REQUIRED
    ended = asyncio.Event()
    heard = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            heard.extend(await reader.read())
        writer.transport.abort()
        ended.set()

    # node-3 dials the others, so the test runs a node-3 whose node-1 is somewhere else.
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=impostor)
    port = server.sockets[0].getsockname()[1]
    cluster = target.cluster
    me = cluster.members[2]
    wrong = (type(me)("node-1", "127.0.0.1", port), cluster.members[1], me)
    there, cluster.members = cluster.members, wrong
    try:
        await cluster.start("node-3")
        async with asyncio.timeout(30):
            await ended.wait()
    finally:
        await cluster.stop("node-3")
        cluster.members = there
        server.close()
    assert heard == b""


GARBAGE = {
    "2 GiB": LENGTH.pack(1 << 31),
    "one over": LENGTH.pack(wire.MAX_FRAME_BYTES + 1),
    "empty": LENGTH.pack(0),
    "no msgpack": LENGTH.pack(4) + b"\xc1\xc1\xc1\xc1",
    "too short": LENGTH.pack(3) + b"\x93\x01\x02",
    "a pickle": LENGTH.pack(len(PICKLE)) + PICKLE,
    "no such kind": LENGTH.pack(5) + b"\x94\x63\x01\x02\x03",
    "a negative term": LENGTH.pack(5) + b"\x94\x01\xff\x02\x03",
}


async def test_a_member_that_sends_garbage_is_closed(target: Target) -> None:
    term = target.leader.term
    context = client(target.cluster.authority, target.stolen)
    for what, sent in GARBAGE.items():
        assert await target.closes(sent, context), what
        assert await still_serves(target, term), what


async def test_entries_out_of_order_are_refused(target: Target) -> None:
    term = target.leader.term
    entries = [wire.Entry(b"\0x", 7, term), wire.Entry(b"\0y", 9, term)]
    message = wire.encode(wire.Append(term, 1, 0, 6, term, entries))
    follower = target.cluster.followers()[0]._settings.me
    target.address = (follower.host, follower.port)
    context = client(target.cluster.authority, target.stolen)
    assert await target.closes(LENGTH.pack(len(message)) + message, context)
    assert await still_serves(target, term)


async def test_plaintext_is_closed(target: Target) -> None:
    term = target.leader.term
    assert await target.closes(b"GET / HTTP/1.1\r\n\r\n" * 10, None)
    assert await still_serves(target, term)


async def test_silent_strangers_by_the_hundred_change_nothing(target: Target) -> None:
    term = target.leader.term
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stranger = stack.enter_context(socket.socket())
            stranger.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                stranger.connect(target.address)
        for _ in range(20):
            assert await still_serves(target, term)
        # A member that was away gets in between them.
        await target.cluster.start("node-3")
        index, _ = await target.leader.propose(b"and you?")
        await target.cluster.replicas["node-3"].wait_applied(index, 30.0)


def test_without_a_descriptor_to_spare_the_raft_thread_waits_as_always(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, 2)
    poller = EpollPoller()
    transport = TlsTransport(cluster.settings("node-1"), poller)
    transport.tryGetReady()
    me = cluster.settings("node-1").me
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with socket.create_connection((me.host, me.port)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            turns, until_s = 0, time.monotonic() + 0.4
            while time.monotonic() < until_s:
                poller.poll(0.05)
                turns += 1
            assert turns < 50  # a spin makes many thousands
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            deadline_s = time.monotonic() + 30
            while not transport._strangers and time.monotonic() < deadline_s:
                transport.tick()
                poller.poll(0.05)
            assert transport._strangers
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        transport.destroy()
        poller.close()
