"""What a client sees through a real Envoy: hosts, paths, headers, upgrades, TLS, refusals."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator

import pytest_asyncio

from reconciler.edge.certificates import fingerprint, issue
from reconciler.edge.table import (
    Cluster,
    EdgeTable,
    Endpoint,
    HostRoutes,
    PathRoute,
    VirtualAddress,
)
from tests.edge.backends import Backend, Client, next_address
from tests.edge.conftest import Served, free_port


@pytest_asyncio.fixture
async def web() -> AsyncIterator[Backend]:
    backend = await Backend("web").start()
    yield backend
    await backend.kill()


@pytest_asyncio.fixture
async def api() -> AsyncIterator[Backend]:
    backend = await Backend("api").start()
    yield backend
    await backend.kill()


def cluster(*backends: Backend) -> Cluster:
    endpoints = tuple(sorted(Endpoint(b.address, b.port) for b in backends))
    return Cluster(backends[0].name, endpoints)


def only(backend: Backend, *paths: PathRoute) -> EdgeTable:
    routes = paths or (PathRoute("/", backend.name),)
    return EdgeTable((cluster(backend),), (), (HostRoutes("app.example.com", routes),))


async def test_the_longest_path_of_the_most_exact_host_answers(
    served: Served, web: Backend, api: Backend
) -> None:
    table = EdgeTable((cluster(api), cluster(web)), (), (
        HostRoutes("app.example.com", (PathRoute("/api", "api"), PathRoute("/", "web"))),
        HostRoutes("*.example.com", (PathRoute("/", "api"),)),
    ))
    assert (await served.publish(table)).acked
    port = served.ingress.http_port
    for host, path, name in (
        ("app.example.com", "/", "web"),
        ("app.example.com", "/api", "api"),
        ("app.example.com", "/api/v1?q=1", "api"),
        ("app.example.com", "/apix", "web"),
        ("app.example.com", "/api/../x", "web"),
        ("APP.Example.COM", "/", "web"),
        (f"app.example.com:{port}", "/", "web"),
        ("other.example.com", "/", "api"),
        ("a.b.example.com", "/", "api"),
    ):
        response = await served.get(host, path)
        assert (host, path, response.json()["name"]) == (host, path, name)


async def test_no_route_is_404_and_nothing_healthy_is_503(served: Served, web: Backend) -> None:
    paths = (PathRoute("/down", "down"), PathRoute("/drains", "drains"), PathRoute("/web", "web"))
    draining = Cluster("drains", (Endpoint(web.address, web.port, draining=True),))
    table = EdgeTable(
        (Cluster("down"), draining, cluster(web)), (), (HostRoutes("app.example.com", paths),)
    )
    assert (await served.publish(table)).acked
    assert (await served.get("app.example.com", "/web")).status_code == 200
    assert (await served.get("app.example.com", "/down")).status_code == 503
    assert (await served.get("app.example.com", "/drains")).status_code == 503
    assert (await served.get("app.example.com", "/else")).status_code == 404
    assert (await served.get("nobody.example.com", "/web")).status_code == 404


async def test_a_stripped_prefix_reaches_the_service_as_the_rest(
    served: Served, web: Backend
) -> None:
    paths = (PathRoute("/a.b/c", "web", strip_prefix=True), PathRoute("/", "web"))
    await served.publish(only(web, *paths))
    for path, seen in (
        ("/a.b/c", "/"), ("/a.b/c/", "/"), ("/a.b/c/x/y?q=/a.b/c", "/x/y?q=/a.b/c"),
        ("/a.b/c?q", "/?q"), ("/aXb/c/x", "/aXb/c/x"),
    ):
        assert (await served.get("app.example.com", path)).json()["path"] == seen


async def test_forwarded_headers_are_set_and_claims_from_outside_are_replaced(
    served: Served, web: Backend
) -> None:
    await served.publish(only(web))
    headers = {"x-forwarded-proto": "https", "x-request-id": "mine"}
    response = await served.get(f"app.example.com:{served.ingress.http_port}", "/", **headers)
    seen = response.json()["headers"]
    assert seen["x-forwarded-proto"] == "http"
    assert seen["x-forwarded-for"]
    assert seen["x-request-id"] not in ("", "mine")
    assert seen["host"] == f"app.example.com:{served.ingress.http_port}"


async def test_a_websocket_passes_where_the_route_allows_it_and_only_there(
    served: Served, web: Backend
) -> None:
    await served.publish(only(web, PathRoute("/ws", "web", websocket=True), PathRoute("/", "web")))

    async def upgrade(path: str) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection(
            served.ingress.address, served.ingress.http_port
        )
        writer.write(
            f"GET {path} HTTP/1.1\r\nhost: app.example.com\r\nupgrade: websocket\r\n"
            "connection: upgrade\r\nsec-websocket-version: 13\r\n"
            "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        status = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1]
        if status == b"101":
            writer.write(b"ping")
        echoed = await reader.read(4) if status == b"101" else b""
        writer.close()
        return status, echoed

    assert await upgrade("/ws") == (b"101", b"ping")
    assert (await upgrade("/"))[0] == b"403"


async def test_https_serves_the_same_routes_with_the_clusters_certificate_and_rotates_it(
    served: Served, web: Backend
) -> None:
    await served.publish(only(web))
    trusting = ssl.create_default_context(cadata=served.authority.cert_pem.decode())
    trusting.set_alpn_protocols(["http/1.1"])

    async def https() -> tuple[bytes, str]:
        reader, writer = await asyncio.open_connection(
            served.ingress.address, served.ingress.https_port, ssl=trusting,
            server_hostname="app.example.com",
        )
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.write(b"GET / HTTP/1.1\r\nhost: app.example.com\r\nconnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        return answer, fingerprint(ssl.DER_cert_to_PEM_cert(shown).encode())

    answer, before = await https()
    assert b" 200 OK" in answer
    assert b'"x-forwarded-proto": "https"' in answer
    renewed = issue(served.authority, "edge.test", names=("app.example.com",))
    served.builder.certificate = renewed
    assert (await served.publish(only(web))).acked
    assert (await https())[1] == fingerprint(renewed.cert_pem) != before


async def test_a_virtual_address_carries_plain_tcp_to_its_service(
    served: Served, web: Backend
) -> None:
    vip = next_address()
    port = free_port(vip)
    table = EdgeTable((cluster(web),), (VirtualAddress(vip, port, "web"),), ())
    assert (await served.publish(table)).acked
    assert await Client(vip, port, "any.thing").ask() == (200, "web")
    assert (await served.publish(EdgeTable())).acked
    try:
        await Client(vip, port, "any.thing").ask()
        closed = False
    except ConnectionRefusedError:
        closed = True
    assert closed


async def test_a_refusal_names_the_listener_while_the_others_serve_and_is_tried_again(
    served: Served, web: Backend
) -> None:
    with socket.socket() as foreign:
        foreign.bind((next_address(), 0))
        foreign.listen()
        address, port = foreign.getsockname()
        good = VirtualAddress(next_address(), port, "web")
        table = EdgeTable((cluster(web),), (VirtualAddress(address, port, "web"), good), ())
        refused = await served.publish(table)
        assert not refused.acked
        assert f"{address}:{port}" in refused.error
        assert await Client(good.ip, port, "x").ask() == (200, "web")
    again = await served.publish(table)
    assert again.acked
    assert await Client(address, port, "x").ask() == (200, "web")


async def test_a_dead_endpoint_costs_no_request_and_is_left_alone(
    served: Served, web: Backend
) -> None:
    twin = await Backend("web").start()
    await served.publish(EdgeTable(
        (cluster(web, twin),), (), (HostRoutes("app.example.com", (PathRoute("/", "web"),)),)
    ))
    client = Client(served.ingress.address, served.ingress.http_port, "app.example.com")
    assert await client.ask() == (200, "web")
    await twin.kill()
    answers = [await client.ask("POST" if n % 2 else "GET") for n in range(100)]
    assert set(answers) == {(200, "web")}


async def test_the_only_endpoint_is_never_ejected_for_a_reset(served: Served, web: Backend) -> None:
    await served.publish(only(web))
    client = Client(served.ingress.address, served.ingress.http_port, "app.example.com")
    for _ in range(5):
        status, _ = await client.ask("POST", "/reset")
        assert status == 503
        assert await client.ask("POST", "/") == (200, "web")
    assert web.resets == 5


async def test_safe_methods_are_sent_again_after_a_reset_and_post_never(
    served: Served, web: Backend
) -> None:
    await served.publish(only(web))
    client = Client(served.ingress.address, served.ingress.http_port, "app.example.com")
    assert (await client.ask("POST", "/reset"))[0] == 503
    assert web.resets == 1
    assert (await client.ask("GET", "/reset"))[0] == 503
    assert web.resets > 2
