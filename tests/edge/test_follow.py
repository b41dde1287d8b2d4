"""The whole edge of one node, following states: real Envoy, real DNS process, real requests."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import NamedTuple

import dns.asyncquery
import dns.message
import pytest_asyncio

from reconciler.edge.ads import AdsServer
from reconciler.edge.certificates import create_ca, fingerprint, issue
from reconciler.edge.dns_feed import DnsProcess, Listener
from reconciler.edge.envoy import EnvoyProcess
from reconciler.edge.follow import Edge
from reconciler.edge.listeners import Ingress
from reconciler.edge.resources import ResourceBuilder
from reconciler.fsm.state import State
from reconciler.language.spec import Route
from tests.edge.backends import Backend, Client, next_address
from tests.edge.conftest import free_port
from tests.edge.states import Log, spec, tick, with_alloc, with_live, without

HOST = "app.example.com"


class Node:
    """An edge as a node runs it; `restart` as if the node's process had been killed."""

    def __init__(self, folder: Path, ingress: Ingress) -> None:
        self.ingress = ingress
        self.envoy = EnvoyProcess(folder / "edge")
        self.dns_at = (next_address(), 0)
        self.dns_at = (self.dns_at[0], free_port(self.dns_at[0]))
        self.dns = DnsProcess(folder / "dns", (Listener(*self.dns_at),))
        self.log = Log(State())
        self.moved = asyncio.Event()
        self.edge = self._new_edge()
        self.running: asyncio.Task[None] | None = None

    def _new_edge(self) -> Edge:
        return Edge(
            self.envoy, AdsServer(), ResourceBuilder(self.ingress), self.dns, self._wake
        )

    def _wake(self) -> None:
        self.moved.set()
        self.moved = asyncio.Event()

    def start(self, log: Log) -> None:
        self.log = log
        self.edge = self._new_edge()
        self.running = asyncio.create_task(self.edge.run(log))

    async def end(self) -> None:
        if self.running is not None:
            self.running.cancel()
            await asyncio.wait([self.running])
            self.running = None

    async def until(self, holds: Callable[[Edge], bool]) -> None:
        async with asyncio.timeout(60):
            while not holds(self.edge):
                assert self.running is not None
                if self.running.done():
                    await self.running
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.moved.wait(), 1)

    async def confirmed(self) -> None:
        index = self.log.state.index
        await self.until(lambda edge: edge.confirmed >= index)

    def client(self) -> Client:
        return Client(self.ingress.address, self.ingress.http_port, HOST)

    async def resolve(self, name: str) -> list[str]:
        query = dns.message.make_query(name, "A")
        answer = await dns.asyncquery.udp(query, self.dns_at[0], port=self.dns_at[1], timeout=20)
        return [row.to_text() for rrset in answer.answer for row in rrset]


@pytest_asyncio.fixture
async def node(tmp_path: Path, ingress: Ingress) -> AsyncIterator[Node]:
    node = Node(tmp_path, ingress)
    try:
        yield node
    finally:
        await node.end()
        await node.envoy.stop()
        await node.dns.stop()


class Web(NamedTuple):
    backend: Backend
    state: State


async def one_web(vip: str = "127.77.0.1") -> Web:
    backend = await Backend("web-aaaaaa").start()
    state = with_live(State(), spec("web", backend.port, Route(host=HOST)), vip)
    return Web(backend, with_alloc(state, "web-aaaaaa", "web", backend.address, backend.port))


async def test_a_state_becomes_routes_addresses_and_names(node: Node) -> None:
    vip = next_address()
    web = await one_web(vip)
    node.start(Log(web.state))
    await node.confirmed()
    assert await node.client().ask() == (200, "web-aaaaaa")
    assert await Client(vip, web.backend.port, "x").ask() == (200, "web-aaaaaa")
    assert await node.resolve("web.mill") == [vip]
    assert await node.resolve("web-aaaaaa.web.mill") == [web.backend.address]
    assert node.edge.last_error == ""
    node.log.write(tick(node.log.state))
    await node.confirmed()
    node.log.write(without(node.log.state, "web"))
    await node.confirmed()
    assert (await node.client().ask())[0] == 404
    await web.backend.kill()


async def test_a_refused_listener_holds_the_confirmation_back_until_it_is_taken(
    node: Node,
) -> None:
    vip = next_address()
    web = await one_web(vip)
    with socket.socket() as foreign:
        foreign.bind((vip, web.backend.port))
        foreign.listen()
        node.start(Log(web.state))
        await node.until(lambda edge: edge.last_error != "")
        assert f"{vip}:{web.backend.port}" in node.edge.last_error
        assert node.edge.confirmed == 0
        assert await node.client().ask() == (200, "web-aaaaaa")
    await node.confirmed()
    assert node.edge.last_error == ""
    await web.backend.kill()


async def test_an_envoy_that_dies_comes_back_with_everything(node: Node) -> None:
    web = await one_web()
    node.start(Log(web.state))
    await node.confirmed()
    pid = node.envoy.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await node.until(lambda edge: edge.last_error != "")
    await node.until(lambda edge: edge.last_error == "")
    assert node.envoy.pid not in (None, pid)
    assert await node.client().ask() == (200, "web-aaaaaa")
    node.log.write(without(node.log.state, "web"))
    await node.confirmed()
    assert (await node.client().ask())[0] == 404
    await web.backend.kill()


async def test_a_node_that_restarts_with_an_older_state_waits_instead_of_going_back(
    node: Node,
) -> None:
    web = await one_web()
    node.start(Log(web.state))
    await node.confirmed()
    pid, client = node.envoy.pid, node.client()
    await node.end()
    assert await client.ask() == (200, "web-aaaaaa")
    assert await node.resolve("web.mill") == ["127.77.0.1"]
    node.start(Log(State()))
    await node.until(lambda edge: "waiting for the log" in edge.last_error)
    assert await client.ask() == (200, "web-aaaaaa")
    node.log.write(web.state)
    await node.confirmed()
    assert node.edge.last_error == ""
    assert await client.ask() == (200, "web-aaaaaa")
    assert node.envoy.pid == pid
    await web.backend.kill()


async def test_a_certificate_that_comes_or_changes_is_served_without_a_restart(
    node: Node,
) -> None:
    web, authority = await one_web(), create_ca()
    node.start(Log(web.state))
    await node.confirmed()
    trusting = ssl.create_default_context(cadata=authority.cert_pem.decode())

    async def shown() -> str:
        try:
            _, writer = await asyncio.open_connection(
                node.ingress.address, node.ingress.https_port, ssl=trusting, server_hostname=HOST
            )
        except ConnectionError:
            return ""
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return fingerprint(ssl.DER_cert_to_PEM_cert(der).encode())

    assert await shown() == ""
    pid = node.envoy.pid
    for identity in (issue(authority, HOST), issue(authority, HOST)):
        node.edge.rotate(identity)
        async with asyncio.timeout(60):
            while await shown() != fingerprint(identity.cert_pem):
                await asyncio.sleep(0.01)
    assert node.envoy.pid == pid
    await web.backend.kill()


class Load:
    """Clients that ask without pause, half over kept and half over fresh connections, GET and
    POST; what is no 200, and what the wrong backend answered, is counted."""

    def __init__(self, client: Callable[[], Client], clients: int) -> None:
        self.answers: Counter[object] = Counter()
        self.retired: dict[str, float] = {}
        self._client = client
        self._stop = asyncio.Event()
        self._tasks = [asyncio.create_task(self._ask(n)) for n in range(clients)]

    async def _ask(self, number: int) -> None:
        client, now = self._client(), asyncio.get_running_loop().time
        for count in itertools.count():
            if self._stop.is_set():
                client.close()
                return
            began = now()
            try:
                method = "POST" if (number // 2 + count) % 2 else "GET"
                status, name = await asyncio.wait_for(client.ask(method), 30)
                late = status == 200 and began > self.retired.get(name, began)
                self.answers["late" if late else status] += 1
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                self.answers[type(error).__name__] += 1
                client.close()
            if number % 2:
                client.close()

    async def end(self) -> Counter[object]:
        self._stop.set()
        await asyncio.gather(*self._tasks)
        return self.answers


async def test_swaps_under_load_fail_no_request_and_the_old_get_none_once_confirmed(
    node: Node,
) -> None:
    """The documented sequence: new in and old draining, in one push or two; every edge confirms;
    the old's requests end; it is killed; it leaves."""
    numbers = itertools.count()

    async def replica() -> Backend:
        return await Backend(f"web-{next(numbers):06}", delay_s=0.02).start(18080)

    live = [await replica() for _ in range(2)]
    state = with_live(State(), spec("web", 18080, Route(host=HOST)), next_address())
    for backend in live:
        state = with_alloc(state, backend.name, "web", backend.address, backend.port)
    node.start(Log(state))
    await node.confirmed()
    load = Load(node.client, 16)
    for number in range(8):
        new = [await replica() for _ in live]
        state = node.log.state
        for backend in new:
            state = with_alloc(state, backend.name, "web", backend.address, backend.port)
        if number % 2:  # the drain is then a change of health alone, right after another change
            node.log.write(state)
            await node.confirmed()
        for old in live:
            state = with_alloc(
                state, old.name, "web", old.address, old.port, "stopping", live=False
            )
        node.log.write(state)
        await node.confirmed()
        load.retired |= {old.name: asyncio.get_running_loop().time() for old in live}
        addresses = {old.address for old in live}
        await node.until(lambda edge, ips=addresses: not edge.busy & ips)  # type: ignore[misc]  # bound now
        for old in live:
            await old.kill()
            state = with_alloc(
                state, old.name, "web", old.address, old.port, "stopped", live=False, routed=False
            )
        node.log.write(state)
        await node.confirmed()
        live = new
    answers = await load.end()
    assert set(answers) == {200}, answers
    assert answers[200] > 100, answers
    for backend in live:
        await backend.kill()
