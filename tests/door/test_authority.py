"""The key and new certificates cross mutual TLS alone, to nodes of the cluster alone."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from reconciler.edge.certificates import (
    create_ca,
    create_key_and_csr,
    issue,
    public_key_sha256,
)
from reconciler.errors import MillError, Unavailable
from reconciler.executor.agent.authority import Refusal, fetch_cluster_key, renew
from reconciler.executor.agent.orders import (
    LOGS,
    SERVICE,
    SESSION,
    Hello,
    Inventory,
    LogRequest,
    Order,
    Report,
    decode_report,
    encode,
)
from reconciler.executor.links import Credentials
from reconciler.fsm import commands as c
from tests.door.cluster import HOST, KEY, Cluster, cluster, credentials, until


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path, 2) as it:
        yield it


def named(it: Cluster, name: str) -> Credentials:
    """A certificate of the cluster's CA for a name, whoever has it."""
    return credentials(issue(it.ca, name, (HOST,)))


def session(channel: grpc.aio.Channel) -> grpc.aio.StreamStreamCall[Order, Report]:
    return channel.stream_stream(f"/{SERVICE}/{SESSION}", request_serializer=encode,
                                 response_deserializer=decode_report)()


async def answer(channel: grpc.aio.Channel, hello: Hello) -> object:
    """What an agent says to a hello: a report, or the code with which it refused."""
    call = session(channel)
    try:
        await call.write(hello)
        return await call.read()
    except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
        return await call.code()


async def test_any_node_gives_the_clusters_key_to_a_node(two: Cluster) -> None:
    for asked, asking in (("node-1", "node-2"), ("node-2", "node-1")):
        to = two.agents[asked]
        key = await fetch_cluster_key(to.address, asked, two.agents[asking].credentials)
        assert key == KEY


async def test_the_key_is_refused_to_a_certificate_whose_name_is_no_node(two: Cluster) -> None:
    with pytest.raises(Refusal, match="node-9 is no node of this cluster"):
        await fetch_cluster_key(two.agents["node-1"].address, "node-1", named(two, "node-9"))


async def test_the_key_is_refused_while_the_state_knows_no_node_at_all(tmp_path: Path) -> None:
    it = Cluster(tmp_path)
    agent = await it.add("node-1")
    try:
        with pytest.raises(Refusal):
            await fetch_cluster_key(agent.address, "node-1", agent.credentials)
    finally:
        await agent.server.stop()


async def test_the_key_is_refused_to_another_clusters_certificate(two: Cluster) -> None:
    stranger = issue(create_ca(), "node-2", (HOST,))
    forged = Credentials(two.ca.cert_pem, stranger.cert_pem, stranger.key_pem)
    with pytest.raises(Unavailable):
        await fetch_cluster_key(two.agents["node-1"].address, "node-1", forged, within_s=1.0)


async def test_the_key_is_taken_from_no_node_but_the_one_that_was_dialled(two: Cluster) -> None:
    with pytest.raises(Unavailable):
        await fetch_cluster_key(two.agents["node-1"].address, "node-2",
                                two.agents["node-2"].credentials, within_s=1.0)


async def test_without_a_certificate_there_is_no_connection(two: Cluster) -> None:
    host, port = two.agents["node-1"].address.split(":")
    context = ssl.create_default_context(cadata=two.ca.cert_pem.decode())
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.to_thread(_read_one, context, host, int(port))


def _read_one(context: ssl.SSLContext, host: str, port: int) -> None:
    with socket.create_connection((host, port), 10) as raw, \
            context.wrap_socket(raw, server_hostname="node-1") as tls:
        if not tls.recv(1):  # TLS 1.3: the refusal comes after our side of the handshake
            raise ConnectionError("closed")


async def test_the_leader_signs_a_new_key_for_the_node_that_asks(two: Cluster) -> None:
    key, csr = create_key_and_csr("node-2", ("203.0.113.9",))
    leader = two.agents["node-1"]
    pem = await renew(leader.address, "node-1", csr, two.agents["node-2"].credentials)
    names = x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(
        x509.SubjectAlternativeName).value
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == [HOST]
    assert names.get_values_for_type(x509.DNSName) == ["node-2", "localhost"]
    assert public_key_sha256(pem) == public_key_sha256(csr)
    fresh = Credentials(two.ca.cert_pem, pem, key)
    assert await fetch_cluster_key(leader.address, "node-1", fresh) == KEY


async def test_nobody_gets_a_certificate_in_another_nodes_name(two: Cluster) -> None:
    leader = two.agents["node-1"]
    for name in ("node-1", "node-3", "localhost"):
        with pytest.raises(Refusal, match=f"is for {name}, not for node-2"):
            await renew(leader.address, "node-1", create_key_and_csr(name)[1],
                        two.agents["node-2"].credentials)
    with pytest.raises(Refusal, match="no node"):
        await renew(leader.address, "node-1", create_key_and_csr("node-9")[1],
                    named(two, "node-9"))


async def test_a_node_that_does_not_lead_names_the_one_that_does(two: Cluster) -> None:
    two.replica.node, two.replica.leading = "node-2", False
    follower = two.agents["node-1"]
    with pytest.raises(Unavailable, match="the leader signs"):
        await renew(follower.address, "node-1", create_key_and_csr("node-2")[1],
                    two.agents["node-2"].credentials, within_s=0.5)


async def test_a_session_comes_from_the_node_that_it_names_as_leader(two: Cluster) -> None:
    to = two.agents["node-2"]
    async with two.agents["node-1"].credentials.channel(to.address, "node-2") as channel:
        assert await answer(channel, Hello(7, "node-2")) == grpc.StatusCode.PERMISSION_DENIED
        assert await answer(channel, Hello(7, "node-9")) == grpc.StatusCode.PERMISSION_DENIED
        # A refused hello moves no term: this one would be too old after it.
        assert isinstance(await answer(channel, Hello(6, "node-1")), Inventory)


async def test_a_certificate_of_no_node_gets_neither_session_nor_logs(two: Cluster) -> None:
    to = two.agents["node-2"]
    async with named(two, "node-9").channel(to.address, "node-2") as channel:
        assert await answer(channel, Hello(9, "node-9")) == grpc.StatusCode.PERMISSION_DENIED
        logs: grpc.aio.UnaryStreamCall[LogRequest, bytes] = channel.unary_stream(
            f"/{SERVICE}/{LOGS}", request_serializer=encode)(LogRequest(alloc="web-000001"))
        assert await logs.code() == grpc.StatusCode.PERMISSION_DENIED


async def test_while_no_node_is_known_the_cas_word_is_enough_for_a_session(tmp_path: Path) -> None:
    it = Cluster(tmp_path)
    agent = await it.add("node-1")
    try:
        async with named(it, "node-2").channel(agent.address, "node-1") as channel:
            assert isinstance(await answer(channel, Hello(1, "node-2")), Inventory)
    finally:
        await agent.server.stop()


async def test_removal_cuts_the_nodes_connections_and_lets_it_in_no_more(two: Cluster) -> None:
    to = two.agents["node-1"]
    async with two.agents["node-2"].credentials.channel(to.address, "node-1") as channel:
        call = session(channel)
        await call.write(Hello(3, "node-2"))
        assert isinstance(await call.read(), Inventory)
        await two.ledger.propose(c.RemoveNode("node-2"))
        async with asyncio.timeout(60):
            assert await call.code() != grpc.StatusCode.OK
    code: object = grpc.StatusCode.UNAVAILABLE
    async with asyncio.timeout(60):
        while code == grpc.StatusCode.UNAVAILABLE:  # cut before it was told
            async with two.agents["node-2"].credentials.channel(to.address, "node-1") as channel:
                code = await answer(channel, Hello(4, "node-2"))
    assert code == grpc.StatusCode.PERMISSION_DENIED
    for work in (
        fetch_cluster_key(to.address, "node-1", two.agents["node-2"].credentials),
        renew(to.address, "node-1", create_key_and_csr("node-2")[1],
              two.agents["node-2"].credentials),
    ):
        with pytest.raises(MillError, match="no node of this cluster"):
            await work


async def test_what_came_past_the_door_is_nobody(two: Cluster) -> None:
    """The server behind the door listens where root alone gets; even there a name is asked for."""
    server = two.agents["node-1"].server
    assert server._folder is not None
    assert server._folder.stat().st_mode & 0o777 == 0o700
    async with grpc.aio.insecure_channel(f"unix:{server._folder}/agent.sock") as channel:
        assert await answer(channel, Hello(9, "node-1")) == grpc.StatusCode.PERMISSION_DENIED


async def test_a_server_that_stopped_leaves_no_folder_behind(tmp_path: Path) -> None:
    async with cluster(tmp_path) as it:
        folder = it.agents["node-1"].server._folder
        assert folder is not None
        assert folder.exists()
    await until(lambda: not folder.exists(), "the folder is gone")
