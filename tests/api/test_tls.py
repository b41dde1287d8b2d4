"""The API over TLS: who is believed, what is refused, and certificates that change under way."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from reconciler.api.client import Client, Unreachable, exit_code
from reconciler.api.connection import Connection
from reconciler.api.tls import client_context, server_context
from reconciler.edge.certificates import create_ca, fingerprint
from reconciler.errors import Malformed
from tests.api.cluster import TOKENS, WAIT_S, Cluster, Node, deployed, read, told

TEXT = {"content-type": "text/plain"}


@pytest.fixture
async def guarded() -> AsyncIterator[Cluster]:
    """Two nodes with TLS; node-1 leads."""
    made = Cluster(tls=True)
    try:
        await made.start(2)
        yield made
    finally:
        await made.stop()


async def shown(node: Node, context: ssl.SSLContext) -> str:
    """The fingerprint of the certificate that a new connection is shown."""
    _, writer = await asyncio.open_connection("127.0.0.1", node.port, ssl=context)
    try:
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return hashlib.sha256(der).hexdigest()
    finally:
        writer.close()


async def test_client_with_the_clusters_ca_reads_writes_and_streams(guarded: Cluster) -> None:
    ca = guarded.authority.cert_pem
    addresses = [node.url for node in guarded.nodes]
    assert all(address.startswith("https://127.0.0.1:") for address in addresses)
    async with Client(addresses, TOKENS["admin"], ca) as client:
        assert [row.name for row in (await client.nodes()).nodes] == ["node-1", "node-2"]
        await client.set_secret("a", "x")
        assert (await client.secret("a")).value == "x"


async def test_follower_forwards_over_tls_streams_included(guarded: Cluster) -> None:
    follower = guarded.client(1)
    assert (await follower.put("/v1/secrets/a", json={"value": "x"})).status_code == 200
    deploys = guarded.nodes[0].deploys
    request = follower.stream("POST", "/v1/deploy", content="service web", headers=TEXT)
    async with asyncio.timeout(WAIT_S), request as answer:
        stream = told(answer)
        assert json.loads((await anext(stream)).data)["phase"] == "started"
        deploy_id = answer.headers["mill-deploy"]
        await deploys.schedule(deploy_id)
        await deploys.finish(deploy_id)
        assert [message async for message in stream][-1].event == "done"
    assert read(await follower.get(f"/v1/deploys/{deploy_id}/events"))[-1].event == "done"


async def test_follower_does_not_hand_a_token_to_a_leader_of_another_ca(guarded: Cluster) -> None:
    leader, other = guarded.nodes[0], create_ca()
    guarded.authority = other
    cert, key, _ = guarded.identity(leader)
    leader.server.take_certificate(cert, key)
    context = client_context(guarded.nodes[1].server.api.site.backend.ca)
    async with httpx.AsyncClient(
        base_url=guarded.nodes[1].url, verify=context,
        headers={"authorization": f"Bearer {TOKENS['admin']}"},
    ) as client:
        answer = await client.get("/v1/services")
    assert answer.status_code == 503
    assert "cannot be reached" in answer.json()["detail"]


async def test_same_api_answers_on_loopback_without_tls(guarded: Cluster) -> None:
    node = guarded.nodes[0]
    async with Client([f"127.0.0.1:{node.plain_port}"], TOKENS["admin"]) as client:
        assert (await client.status()).leader == "node-1"
    await node.server.stop()
    for port in (node.port, node.plain_port):
        with pytest.raises(OSError, match=r"refused|failed"):
            await asyncio.open_connection("127.0.0.1", port)


@pytest.mark.parametrize("ca", ["none", "another"])
async def test_node_that_the_ca_does_not_vouch_for_is_not_asked(guarded: Cluster, ca: str) -> None:
    pem = create_ca().cert_pem if ca == "another" else None
    client = Client([guarded.nodes[0].url], TOKENS["admin"], pem)
    async with client:
        with pytest.raises(Unreachable, match="is not trusted: its certificate") as caught:
            await client.status()
    assert exit_code(caught.value) == 3
    assert "MILL_CA" in caught.value.hint


async def test_certificate_of_another_host_is_not_believed(guarded: Cluster) -> None:
    """The name is checked, not the CA alone: any node's certificate is not every node's."""
    address = guarded.nodes[0].url.replace("127.0.0.1", "127.0.0.7")
    port = guarded.nodes[0].port
    cert, key, _ = guarded.identity(guarded.nodes[0])
    server = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.7", port,
                                        ssl=server_context(cert, key))
    async with server:
        client = Client([address], TOKENS["admin"], guarded.authority.cert_pem)
        async with client:
            with pytest.raises(Unreachable, match=r"not valid for '127\.0\.0\.7'"):
                await client.status()


async def test_address_without_tls_behind_https_is_said(guarded: Cluster) -> None:
    address = f"https://127.0.0.1:{guarded.nodes[0].plain_port}"
    async with Client([address], TOKENS["admin"], guarded.authority.cert_pem) as client:
        with pytest.raises(Unreachable, match="is not trusted: no TLS"):
            await client.status()


async def test_first_address_that_is_trusted_is_asked(guarded: Cluster) -> None:
    addresses = [f"https://127.0.0.1:{guarded.nodes[0].plain_port}", guarded.nodes[1].url]
    async with Client(addresses, TOKENS["admin"], guarded.authority.cert_pem) as client:
        assert (await client.status()).node == "node-1"


async def test_ca_that_is_no_certificate_is_refused_at_once() -> None:
    for pem in (b"", b"junk", b"\xff"):
        with pytest.raises(Malformed, match="no certificate"):
            Connection(["https://127.0.0.1:1"], "", pem)


async def test_new_certificate_is_shown_to_new_connections_without_a_restart(
    guarded: Cluster,
) -> None:
    node, context = guarded.nodes[0], client_context(guarded.authority.cert_pem)
    before = await shown(node, context)
    standing = guarded.client()
    assert (await standing.get("/v1/services")).status_code == 200
    cert, key, identity = guarded.identity(node)
    node.server.take_certificate(cert, key)
    assert await shown(node, context) == fingerprint(identity.cert_pem) != before
    assert (await standing.get("/v1/services")).status_code == 200
    assert (await guarded.client().get("/v1/services")).status_code == 200


async def test_files_that_are_no_pair_change_nothing(guarded: Cluster, tmp_path: Path) -> None:
    node, context = guarded.nodes[0], client_context(guarded.authority.cert_pem)
    before = await shown(node, context)
    _, _, one = guarded.identity(node)
    _, _, two = guarded.identity(node)
    (tmp_path / "cert.pem").write_bytes(one.cert_pem)
    (tmp_path / "key.pem").write_bytes(two.key_pem)
    with pytest.raises(ssl.SSLError):
        node.server.take_certificate(tmp_path / "cert.pem", tmp_path / "key.pem")
    with pytest.raises(OSError, match="No such file"):
        node.server.take_certificate(tmp_path / "none.pem", tmp_path / "key.pem")
    assert await shown(node, context) == before


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_old_versions_of_tls_are_refused(guarded: Cluster) -> None:
    context = client_context(guarded.authority.cert_pem)
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await shown(guarded.nodes[0], context)


async def test_garbage_and_silence_in_handshakes_do_not_disturb_others(guarded: Cluster) -> None:
    node = guarded.nodes[0]
    await deployed(guarded)
    idle = [socket.create_connection(("127.0.0.1", node.port)) for _ in range(200)]
    try:
        for number, sock in enumerate(idle[:100]):
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n" if number % 2 else b"\x16\x03\x01\xff\xff" * 9)
        answers = await asyncio.gather(*(
            guarded.client().get("/v1/services") for _ in range(10)))
    finally:
        for sock in idle:
            sock.close()
    assert {answer.status_code for answer in answers} == {200}


async def test_port_that_is_taken_leaves_nothing_behind(guarded: Cluster) -> None:
    """The second socket fails: the first one is let go too."""
    from reconciler.api.server import Server

    backend = guarded.nodes[0].server.api.site.backend
    cert, key, _ = guarded.identity(guarded.nodes[0])
    mine, closed = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
    port = mine.getsockname()[1]
    closed.close()
    with pytest.raises(OSError, match=r"Bad file descriptor|Invalid argument"):
        await Server(backend).start(sockets=[mine], tls=server_context(cert, key), plain=[closed])
    with socket.create_server(("127.0.0.1", port)):
        pass
