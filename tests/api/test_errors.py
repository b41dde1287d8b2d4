"""Who is let in, and how a request is refused that never reaches its call."""

from __future__ import annotations

import asyncio
import socket

import httpx
import pytest

from reconciler.api.server import CALLS, Server
from tests.api.cluster import TOKENS, WAIT_S, Cluster

CLOSED = sorted({(call.method, call.path) for call in CALLS if not call.open})


async def test_every_call_but_health_wants_a_token(
    cluster: Cluster, subtests: pytest.Subtests
) -> None:
    client = cluster.client(token=None)
    for method, path in CLOSED:
        with subtests.test(call=f"{method} {path}"):
            answer = await client.request(method, path)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == 'Bearer realm="mill"'
            assert answer.headers["content-type"] == "application/problem+json"


async def test_token_that_is_none_of_the_clusters_is_refused(
    cluster: Cluster, subtests: pytest.Subtests
) -> None:
    client = cluster.client(token=None)
    for sent in (b"Bearer nope", b"Bearer", b"Basic bWlsbA==", b"mill-admin-token",
                 b"Bearer \xe9", b"Bearer mill-admin-token x"):
        with subtests.test(sent=sent):
            answer = await client.get("/v1/status", headers={b"authorization": sent})
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_scheme_of_the_token_has_no_case(cluster: Cluster) -> None:
    answer = await cluster.client(token=None).get(
        "/v1/status", headers={"authorization": f"bEaReR  {TOKENS['admin']}"}
    )
    assert answer.status_code == 200


async def test_health_needs_no_token_and_readiness_a_leader(cluster: Cluster) -> None:
    client = cluster.client(token=None)
    assert (await client.get("/healthz")).json() == {"status": "ok", "node": "node-1"}
    assert (await client.get("/readyz")).json()["leader"] == "node-1"
    cluster.log.leader = None
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert (await client.get("/healthz")).status_code == 200


ROLES = [
    ("read", "GET", "/v1/status", True), ("read", "POST", "/v1/services/web/restart", False),
    ("read", "GET", "/v1/secrets", True), ("read", "GET", "/v1/secrets/a", False),
    ("deploy", "POST", "/v1/services/web/restart", True),
    ("deploy", "GET", "/v1/secrets/a", False), ("deploy", "PUT", "/v1/secrets/a", False),
    ("deploy", "DELETE", "/v1/secrets/a", False), ("deploy", "POST", "/v1/sources", False),
    ("deploy", "DELETE", "/v1/sources/a", False), ("deploy", "POST", "/v1/sources/a/sync", True),
    ("deploy", "POST", "/v1/plan", True), ("read", "POST", "/v1/deploy", False),
]


async def test_role_of_a_token_bounds_what_it_may_do(
    cluster: Cluster, subtests: pytest.Subtests
) -> None:
    cluster.grant("read")
    cluster.grant("deploy")
    clients = {role: cluster.client(token=role) for role in ("read", "deploy")}
    for role, method, path, allowed in ROLES:
        with subtests.test(call=f"{role}: {method} {path}"):
            answer = await clients[role].request(method, path)
            assert (answer.status_code != 403) is allowed
            assert ("use a token of role" in answer.text) is not allowed


NOT_BUILT = [
    "/", "/v1", "/v1/tasks", "/v1/tasks/x", "/v1/volumes", "/v1/hooks/x", "/v1/metrics",
    "/v1/nodes/node-1/x", "/v1/status/",
    "/v1/sources/x/suspend", "/v1/services?at=5",
]


async def test_what_is_not_built_is_not_found(
    api: httpx.AsyncClient, subtests: pytest.Subtests
) -> None:
    for path in NOT_BUILT:
        with subtests.test(path=path):
            answer = await api.get(path)
            assert answer.status_code == 404
            assert answer.json()["status"] == 404
            assert answer.headers["content-type"] == "application/problem+json"


async def test_wrong_method_is_told_which_there_are(api: httpx.AsyncClient) -> None:
    for path, allow in (("/v1/secrets/a", "DELETE, GET, PUT"), ("/v1/deploy", "POST"),
                        ("/v1/sources", "GET, POST"), ("/v1/nodes/node-1/drain", "POST"),
                        ("/v1/nodes/node-1", "DELETE"), ("/v1/tokens", "GET, POST")):
        answer = await api.patch(path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allow)
        assert answer.json()["title"] == "Method Not Allowed"


async def test_body_over_the_bound_is_refused_declared_or_chunked(api: httpx.AsyncClient) -> None:
    async def chunks() -> object:
        for _ in range(40):
            yield b"x" * (64 * 1024)

    headers = {"content-type": "text/plain"}
    declared = await api.post("/v1/deploy", content=b"x" * (2 * 1024 * 1024 + 1), headers=headers)
    chunked = await api.post("/v1/deploy", content=chunks(),  # type: ignore[arg-type]  # an async generator
                             headers=headers)
    for answer in (declared, chunked):
        assert answer.status_code == 413
        assert "2 MiB" in answer.json()["detail"]


async def test_body_declared_too_large_is_refused_before_it_is_sent(cluster: Cluster) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", cluster.nodes[0].port)
    writer.write(
        b"POST /v1/deploy HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n"
        b"Authorization: Bearer mill-admin-token\r\nContent-Length: 3000000\r\n\r\n"
    )
    await writer.drain()
    async with asyncio.timeout(WAIT_S):
        assert b" 413 " in await reader.readline()
    writer.close()


async def test_body_at_the_bound_is_read(api: httpx.AsyncClient) -> None:
    content = b"service web".ljust(2 * 1024 * 1024)
    answer = await api.post("/v1/plan", content=content, headers={"content-type": "text/plain"})
    assert answer.json()["services"][0]["name"] == "web"


async def test_body_that_breaks_off_starts_nothing(cluster: Cluster) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", cluster.nodes[0].port)
    writer.write(
        b"POST /v1/deploy?detach=true HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n"
        b"Authorization: Bearer mill-admin-token\r\nContent-Length: 100\r\n\r\nservice web"
    )
    await writer.drain()
    writer.write_eof()
    async with asyncio.timeout(WAIT_S):
        await reader.read()
    writer.close()
    assert not cluster.nodes[0].deploys.requests


async def test_mistake_of_ours_is_a_500_that_tells_nothing_and_is_logged(
    cluster: Cluster, api: httpx.AsyncClient, capsys: pytest.CaptureFixture[str]
) -> None:
    value = "hunter" + "2"  # in two, for the traceback shows this line

    def broken(count: int) -> bytes:
        raise RuntimeError(f"the value is {value}")

    backend = cluster.nodes[0].server.api.site.backend
    object.__setattr__(backend, "random_bytes", broken)
    answer = await api.put("/v1/secrets/a", json={"value": value})
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    logged = "".join(capsys.readouterr())
    assert "request_failed" in logged
    assert "RuntimeError" in logged
    assert value not in answer.text + logged


async def test_stopping_ends_streams_and_frees_the_port(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    request = cluster.client().stream("GET", "/v1/events?follow=true")
    async with asyncio.timeout(WAIT_S), request as answer:
        pieces = answer.aiter_bytes()
        await anext(pieces)
        await node.server.stop()
        assert not [piece async for piece in pieces if not piece.startswith(b"id:")]
    with pytest.raises(httpx.ConnectError):
        await cluster.client().get("/healthz")


async def test_port_that_is_taken_is_an_error_of_start(cluster: Cluster) -> None:
    other = Server(cluster.nodes[0].server.api.site.backend)
    with pytest.raises(OSError, match="in use"):
        await other.start(port=cluster.nodes[0].port)
    await other.stop()


async def test_answers_never_wait_for_a_delayed_acknowledgement(cluster: Cluster) -> None:
    """Nagle's algorithm is off on accepted sockets, whoever made the listening one."""
    given = socket.create_server(("127.0.0.1", 0))
    other = Server(cluster.nodes[0].server.api.site.backend)
    port = await other.start(sockets=[given])
    try:
        for server, at in ((cluster.nodes[0].server, cluster.nodes[0].port), (other, port)):
            _, writer = await asyncio.open_connection("127.0.0.1", at)
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            await writer.drain()
            (running,) = server._running.values()
            async with asyncio.timeout(WAIT_S):
                while not running.server_state.connections:
                    await asyncio.sleep(0)
            for connection in running.server_state.connections:
                accepted = connection.transport.get_extra_info("socket")
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()
    finally:
        await other.stop()
