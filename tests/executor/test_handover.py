"""Leadership changes hands under concurrent clients: real logs, real APIs, no failed write."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from reconciler.api.server import Server
from reconciler.api.services import Backend
from reconciler.clock import RealClock
from reconciler.executor.admit import Admission
from reconciler.executor.drain import leave
from reconciler.executor.drains import Nodes
from reconciler.executor.front import Front
from reconciler.executor.history import History
from reconciler.executor.reading import Reader
from reconciler.fsm import commands as c
from reconciler.fsm.records import Secret, Token
from reconciler.node_backend import Deploys
from tests.api.cluster import Seen, WrittenLogs, WrittenSources
from tests.executor.log_world import LogNode, LogWorld, log_world

TOKEN = "mill-admin-token"
MANIFEST = 'service "web" { image = "registry.example.com/web@sha256:' + "1" * 64 + '" }'
OPEN = "may or may not have happened"


async def _no_registry(name: str, _auth: str | None) -> str:
    raise AssertionError(f"{name} is pinned")


def _no_secret(secret: Secret) -> str:
    raise AssertionError(f"{secret.name} is not needed")


@dataclass
class Apis:
    """An API before each node's log."""

    world: LogWorld
    reader: Reader
    servers: dict[str, Server] = field(default_factory=dict)
    clients: dict[str, httpx.AsyncClient] = field(default_factory=dict)

    async def open(self, name: str) -> None:
        node = self.world.nodes[name]
        ledger = node.ledger
        front = Front(ledger, Admission(ledger.read, self.reader, _no_registry, _no_secret),
                      lambda: None)
        server = Server(Backend(
            node=name, ledger=ledger, history=History(node.replica), deploys=Deploys(front),
            logs=WrittenLogs(), sources=WrittenSources(ledger), health=Seen(),
            cluster_key=bytes(32), clock=RealClock(), random_bytes=os.urandom,
            nodes=Nodes(ledger, node.members.out),
        ))
        port = await server.start()
        number = int(name.rpartition("-")[2])
        await self.world.register(number, api=f"127.0.0.1:{port}")
        await self.world.until(lambda: name in ledger.state.nodes and
                               ledger.state.nodes[name].api.endswith(f":{port}"), "it is back")
        self.servers[name] = server
        self.clients[name] = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False,
            headers={"authorization": f"Bearer {TOKEN}"})

    async def close(self, name: str) -> None:
        await self.clients.pop(name).aclose()
        await self.servers.pop(name).stop()

    async def leave(self, name: str) -> LogNode:
        """As a node stops: leadership goes first, the API next, the log last."""
        node = self.world.nodes.pop(name)
        await leave(node.ledger, node.replica.transfer, name)
        await self.close(name)
        await node.down()
        return node


@contextlib.asynccontextmanager
async def apis(folder: Path) -> AsyncIterator[Apis]:
    async with log_world(folder, 3, founders=3) as world:
        digest = hashlib.sha256(TOKEN.encode()).hexdigest()
        await world.propose(c.CreateToken(Token(id="t1", sha256=digest)))
        made = Apis(world, Reader())
        try:
            for name in tuple(world.nodes):
                await made.open(name)
            yield made
        finally:
            for name in tuple(made.servers):
                await made.close(name)
            await made.reader.close()


@dataclass
class Writers:
    """Clients that write one secret after the other, each through its own node's API."""

    apis: Apis
    names: tuple[str, ...]
    done: asyncio.Event = field(default_factory=asyncio.Event)
    written: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    async def __aenter__(self) -> Writers:
        self._task = asyncio.gather(*(
            self._write(name, number) for name in self.names for number in range(3)))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.done.set()
        await self._task

    async def _write(self, node: str, writer: int) -> None:
        count = 0
        while not self.done.is_set():
            secret = f"{node}.{writer}.{count}"
            answer = await self.apis.clients[node].put(f"/v1/secrets/{secret}",
                                                       json={"value": "x"})
            if answer.status_code == 200:
                self.written.append(secret)
            else:
                self.failed.append(f"{node}: {answer.status_code} {answer.text}")
            count += 1

    async def progress(self, more: int = 20) -> None:
        begin = len(self.written)
        await self.apis.world.until(lambda: self.failed or len(self.written) >= begin + more,
                                    "writes go on")

    async def check(self) -> None:
        """Nothing failed, and each write is there once."""
        assert self.failed == []
        state = await (await self.apis.world.leader()).ledger.read()
        versions = {name: len(s.versions) for name, s in state.secrets.items()}
        assert versions == dict.fromkeys(self.written, 1)


async def test_writers_see_nothing_of_leadership_that_goes_round(tmp_path: Path) -> None:
    async with apis(tmp_path) as a:
        async with Writers(a, tuple(a.servers)) as writers:
            for _ in range(8):
                leader = await a.world.leader()
                name = leader.replica.leader
                await leader.replica.transfer()
                await a.world.until(
                    lambda name=name: (now := a.world.leading()) and now.replica.leader != name,
                    "another leader")
                await writers.progress()
        await writers.check()


async def test_writers_see_nothing_of_a_leader_that_stops(tmp_path: Path) -> None:
    async with apis(tmp_path) as a:
        for _ in range(3):
            name = (await a.world.leader()).replica.leader or ""
            others = tuple(n for n in a.servers if n != name)
            async with Writers(a, others) as writers:
                await writers.progress()
                await a.leave(name)
                await writers.progress()
            assert writers.failed == []
            await a.world.start(name)
            await a.open(name)


async def test_writers_see_nothing_of_a_leader_that_is_drained(tmp_path: Path) -> None:
    async with apis(tmp_path) as a:
        async with Writers(a, tuple(a.servers)) as writers:
            for _ in range(3):
                name = (await a.world.leader()).replica.leader or ""
                other = next(n for n in a.servers if n != name)
                answer = await a.clients[other].post(f"/v1/nodes/{name}/drain?timeout=60s")
                assert answer.status_code == 200, answer.text
                assert "event: done" in answer.text, answer.text
                assert (await a.world.leader()).replica.leader != name
                await writers.progress()
                back = await a.clients[other].post(f"/v1/nodes/{name}/undrain")
                assert back.status_code == 200, back.text
        await writers.check()


async def test_one_idempotency_key_is_one_deploy_whoever_leads(tmp_path: Path) -> None:
    """Clients that repeat themselves, as anybody does who gets no answer, at every node."""
    async with apis(tmp_path) as a:
        ids: list[str] = []

        async def ask(node: str) -> None:
            while True:
                with contextlib.suppress(httpx.HTTPError, KeyError):
                    answer = await a.clients[node].post(
                        "/v1/deploy?detach=true", content=MANIFEST,
                        headers={"idempotency-key": "the-one", "content-type": "text/plain"})
                    if answer.status_code == 202:
                        ids.append(answer.json()["id"])
                        return
                    assert answer.status_code == 503, answer.text
                await asyncio.sleep(0.02)

        async with asyncio.timeout(120):
            for _ in range(4):
                name = (await a.world.leader()).replica.leader or ""
                others = [n for n in a.servers if n != name]
                asking = [asyncio.create_task(ask(node)) for node in others for _ in range(3)]
                await a.leave(name)
                await asyncio.gather(*asking)
                await a.world.start(name)
                await a.open(name)
        assert len(set(ids)) == 1
        state = await (await a.world.leader()).ledger.read()
        assert list(state.deploys) == [ids[0]]
