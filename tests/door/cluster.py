"""Agents on loopback with the cluster's authority behind them, over a log in memory."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from reconciler.edge.certificates import (
    CsrSigner,
    Identity,
    create_ca,
    issue,
    write_identity,
)
from reconciler.edge.identity import NodeIdentity
from reconciler.executor.agent.orders import Beat
from reconciler.executor.agent.server import AgentServer
from reconciler.executor.agent.supervise import Supervisor
from reconciler.executor.authority import ClusterAuthority, found_authority
from reconciler.executor.joining import Joining
from reconciler.executor.links import Credentials
from reconciler.fsm import commands as c
from reconciler.log.settings import Member
from tests.executor.world import MemoryImages, MemoryRuntime, NoLines, SteppedClock
from tests.replica import memory_ledger

HOST = "127.0.0.1"
KEY = hashlib.sha256(b"the cluster's key of a test").digest()


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        port: int = taken.getsockname()[1]
        return port


def credentials(identity: Identity) -> Credentials:
    """With which the node of that identity dials."""
    return Credentials(identity.ca_pem, identity.cert_pem, identity.key_pem)


@dataclass
class Agent:
    """One node's agent and what it knows of itself."""

    name: str
    address: str
    identity: NodeIdentity
    server: AgentServer
    credentials: Credentials


class Cluster:
    """Nodes that share one log in memory, whose leader is node-1 until told otherwise."""

    def __init__(self, folder: Path, days: float = 365.0) -> None:
        self.folder, self._days = folder, days
        self.clock = SteppedClock()
        self.ledger, self.replica = memory_ledger(self.clock)
        self.ca = create_ca()
        self.agents: dict[str, Agent] = {}
        self.signer = CsrSigner(days)
        self.authority = ClusterAuthority(self.ledger, self.signer, KEY)
        self.joining = Joining(
            self.ledger, self.authority, self.signer,
            lambda: ((Member("node-1", HOST, 4401), True),), self.ca.cert_pem)

    async def found(self, nodes: int) -> None:
        await self.ledger.propose(c.InitCluster("test", "t", "0" * 64))
        await found_authority(self.ledger, self.ca.cert_pem, self.ca.key_pem, KEY)
        for number in range(1, nodes + 1):
            agent = await self.add(f"node-{number}")
            await self.ledger.propose(c.RegisterNode(
                name=agent.name, number=number, api=f"{HOST}:{free_port()}", agent=agent.address,
                cpu_milli=4000, memory_bytes=4_000_000_000, log=f"{HOST}:{free_port()}"))

    async def add(self, name: str) -> Agent:
        """An agent that serves, not yet in the log."""
        write_identity(self.folder / name, issue(
            self.ca, name, (HOST,), names=("localhost",), days=self._days))
        kept = NodeIdentity(name, self.folder / name)
        server: AgentServer

        def beat() -> Beat:
            return Beat(at_ms=0, edge_index=self.ledger.state.index)

        supervisor = Supervisor(
            MemoryRuntime(), self.folder / name / "allocs", lambda r: server.tell(r),  # noqa: PLW0108  made below
            time.monotonic)
        server = AgentServer(name, supervisor, MemoryImages(), NoLines(), beat, lambda: 0,
                             lambda: self.ledger.state.nodes, self.authority)
        address = f"{HOST}:{free_port()}"
        identity = kept.identity
        await server.start(address, identity.ca_pem, identity.cert_pem, identity.key_pem)
        agent = Agent(name, address, kept, server, credentials(identity))
        self.agents[name] = agent
        return agent


@contextlib.asynccontextmanager
async def cluster(folder: Path, nodes: int = 1, days: float = 365.0) -> AsyncIterator[Cluster]:
    """A cluster that serves, and is gone at the end."""
    it = Cluster(folder, days)
    try:
        await it.found(nodes)
        yield it
    finally:
        for agent in it.agents.values():
            await agent.server.stop()


async def until(fact: object, what: str, within_s: float = 60.0) -> None:
    """Wait for a fact; `fact` is called again and again."""
    assert callable(fact)
    try:
        async with asyncio.timeout(within_s):
            while not fact():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"never happened: {what}") from None


def days(seconds: float) -> float:
    """Of a certificate's life."""
    return datetime.timedelta(seconds=seconds) / datetime.timedelta(days=1)


@contextlib.contextmanager
def closing(sockets: list[socket.socket]) -> Iterator[list[socket.socket]]:
    """Close them all, also after a failure."""
    try:
        yield sockets
    finally:
        for each in sockets:
            each.close()
