"""Ten thousand connections of all bad kinds change nothing that a user sees."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from reconciler.api.tls import client_context
from reconciler.edge.certificates import Identity, create_ca, issue, write_identity
from reconciler.executor.agent.authority import fetch_cluster_key
from reconciler.executor.agent.orders import (
    SERVICE,
    SESSION,
    Hello,
    Inventory,
    decode_report,
    encode,
)
from tests.door.cluster import HOST, KEY, credentials, free_port

ROOT = Path(__file__).parents[2]
CONNECTIONS = 10_000
COMMITS = 100
TOKEN = "flooded-admin-token"
DEADLINE_S = 60.0
PORTS = {"log": 500, "agent": 500, "api": 2_500, "api over TLS": 2_500}
"""What a node listens on, and how many descriptors a flood there may hold."""
NAMES = ["node-1", "node-2", "node-3"]


class Process:
    """A child that is asked and answers by lines."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self._child = child

    @classmethod
    async def start(cls, module: str, *arguments: str) -> Process:
        return cls(await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, *arguments, cwd=ROOT,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE))

    async def line(self) -> str:
        assert self._child.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            return (await self._child.stdout.readline()).decode().strip()

    async def ask(self, **question: object) -> dict[str, Any]:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(question).encode() + b"\n")
        answer: dict[str, Any] = json.loads(await self.line())
        return answer

    async def end(self) -> str:
        """Close its input and wait for it; its last line."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        last = await self.line()
        async with asyncio.timeout(DEADLINE_S):
            await self._child.wait()
        return last

    async def kill(self) -> None:
        if self._child.returncode is None:
            self._child.kill()
            await self._child.wait()


class Flooded:
    """Three nodes, each a process, and the leader among them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = create_ca()
        self.ports = {name: tuple(free_port() for _ in PORTS) for name in NAMES}
        self.listed = ",".join(f"{n}={':'.join(map(str, p))}" for n, p in self.ports.items())
        self.nodes: dict[str, Process] = {}
        self.identities: dict[str, Identity] = {}
        self.leader = ""
        self.term = 0

    async def start(self) -> None:
        """The last one comes once another leads, so that it is one that dials the leader."""
        for name in NAMES:
            self.identities[name] = issue(self.ca, name, (HOST,))
            write_identity(self.folder / name, self.identities[name])
        for name in NAMES[:2]:
            await self.start_node(name)
        async with asyncio.timeout(DEADLINE_S):
            while not self.leader:
                for name, node in self.nodes.items():
                    status = await node.ask(status=1)
                    if status["leading"]:
                        self.leader, self.term = name, status["term"]
                await asyncio.sleep(0.05)
        await self.start_node(NAMES[2])
        await self.nodes[self.leader].ask(
            found=hashlib.sha256(TOKEN.encode()).hexdigest(), names=NAMES)

    async def start_node(self, name: str) -> None:
        """It serves once it says so."""
        self.nodes[name] = await Process.start(
            "tests.door.member", str(self.folder), name, self.listed)
        assert await self.nodes[name].line() == "{}"

    async def commit_s(self) -> float:
        """The seconds of a commit."""
        answer = await self.nodes[self.leader].ask(commit=COMMITS)
        return float(answer["seconds"]) / COMMITS

    async def status(self) -> dict[str, Any]:
        return await self.nodes[self.leader].ask(status=1)

    async def settled(self, descriptors: int) -> None:
        """Everything that came with the flood is closed again."""
        seen = 0
        try:
            async with asyncio.timeout(DEADLINE_S):
                while (seen := (await self.status())["descriptors"]) > descriptors:
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise AssertionError(f"{seen} descriptors, {descriptors} before") from None


@pytest.fixture
async def flooded(tmp_path: Path) -> AsyncIterator[Flooded]:
    it = Flooded(tmp_path)
    try:
        await it.start()
        yield it
    finally:
        for node in it.nodes.values():
            await node.kill()


@contextlib.asynccontextmanager
async def flood(port: int) -> AsyncIterator[Process]:
    process = await Process.start("tests.door.flood", str(port), str(CONNECTIONS))
    try:
        yield process
    finally:
        await process.kill()


async def serves(it: Flooded, before_s: float, told: list[str], what: str, most: float) -> None:
    """Commits go on, in the same term, at a pace that nobody would notice."""
    seconds = statistics.median([await it.commit_s() for _ in range(3)])
    status = await it.status()
    told.append(f"{what}: {seconds * 1000:.2f} ms a commit ({before_s * 1000:.2f} before), "
                f"{status['descriptors']} descriptors, {status['rss_mib']} MiB")
    assert status["leading"], what
    assert status["term"] == it.term, what
    assert seconds < most * max(before_s, 0.002), told


@pytest.mark.timeout(280)
@pytest.mark.parametrize("where", PORTS)
async def test_ten_thousand_connections_change_nothing(
    flooded: Flooded, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    it, told = flooded, [""]
    port = it.ports[it.leader][list(PORTS).index(where)]
    await it.commit_s()
    before_s = statistics.median([await it.commit_s() for _ in range(3)])
    begun = await it.status()
    async with member_session(it) as beats, flood(port) as process:
        coming = asyncio.create_task(process.line())
        await serves(it, before_s, told, "while they come", 12.0)
        assert await coming == "held"
        await serves(it, before_s, told, "while they are held", 12.0)
        held = await it.status()
        assert held["descriptors"] < begun["descriptors"] + PORTS[where], told
        assert held["rss_mib"] < begun["rss_mib"] + 200, told
        await new_connections_get_in(it, where, told)
        if where == "log":
            await a_follower_comes_back(it, told)
        heard = len(beats)
        async with asyncio.timeout(DEADLINE_S):
            while len(beats) < heard + 2:
                await asyncio.sleep(0.05)
        told.append(f"opened {await process.end()}")
    await it.settled(begun["descriptors"] + 8)
    await serves(it, before_s, told, "afterwards", 8.0)
    with capsys.disabled():
        print("\n  ".join(told))


async def new_connections_get_in(it: Flooded, where: str, told: list[str]) -> None:
    """A node's, and a person's, to the very ports."""
    begun = time.perf_counter()
    address = f"{HOST}:{it.ports[it.leader][1]}"
    other = next(name for name in NAMES if name != it.leader)
    assert await fetch_cluster_key(
        address, it.leader, credentials(it.identities[other]), DEADLINE_S) == KEY
    agent_s = time.perf_counter() - begun
    scheme, number = ("https", 3) if where == "api over TLS" else ("http", 2)
    url = f"{scheme}://{HOST}:{it.ports[it.leader][number]}/v1/secrets/s2"
    begun = time.perf_counter()
    async with httpx.AsyncClient(timeout=DEADLINE_S, trust_env=False,
                                 verify=client_context(it.ca.cert_pem)) as client:
        answer = await client.put(url, json={"value": "x"},
                                  headers={"authorization": f"Bearer {TOKEN}"})
    assert answer.status_code < 300, answer.text
    told.append(f"a node came in within {agent_s:.2f} s, a write over a new connection to the "
                f"API took {time.perf_counter() - begun:.2f} s")


async def a_follower_comes_back(it: Flooded, told: list[str]) -> None:
    """One that dials the flooded leader: of two nodes the one with the greater name does."""
    name = NAMES[-1]
    await it.nodes[name].kill()
    await it.commit_s()
    begun = time.perf_counter()
    await it.start_node(name)
    committed = (await it.status())["applied"]
    async with asyncio.timeout(DEADLINE_S):
        while (await it.nodes[name].ask(status=1))["applied"] < committed:
            await asyncio.sleep(0.1)
    told.append(f"{name} came back within {time.perf_counter() - begun:.1f} s")


@contextlib.asynccontextmanager
async def member_session(it: Flooded) -> AsyncIterator[list[object]]:
    """A leader's session with the flooded node's agent; its heartbeats as they come."""
    address = f"{HOST}:{it.ports[it.leader][1]}"
    other = next(name for name in NAMES if name != it.leader)
    beats: list[object] = []
    async with credentials(it.identities[other]).channel(address, it.leader) as channel:
        call = channel.stream_stream(f"/{SERVICE}/{SESSION}", request_serializer=encode,
                                     response_deserializer=decode_report)()
        await call.write(Hello(1_000, other))
        assert isinstance(await call.read(), Inventory)

        async def hear() -> None:
            with contextlib.suppress(grpc.aio.AioRpcError):  # told by its being done
                while True:
                    beats.append(await call.read())

        hearing = asyncio.create_task(hear())
        yield beats
        assert not hearing.done(), "the session was cut"
        hearing.cancel()
        call.cancel()
        await asyncio.gather(hearing, return_exceptions=True)
