"""Three nodes in one process: real ledger, links, agents and gRPC; containers in memory.

What a container does is written in its image's tag: `ok`, `exits`, `sick`, `oom`, `nodefault`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from reconciler.clock import RealClock
from reconciler.edge.certificates import create_ca, issue
from reconciler.executor.agent.orders import Beat, LogLine, LogRequest, Pull, PullReport, Start
from reconciler.executor.agent.probe import Target
from reconciler.executor.agent.server import AgentServer
from reconciler.executor.agent.supervise import Exit, Found, StartFailed, Supervisor
from reconciler.executor.drain import Transfer, stay
from reconciler.executor.leader import Leader
from reconciler.executor.ledger import Ledger
from reconciler.executor.links import Credentials, Links
from reconciler.fsm import commands as c
from reconciler.fsm.records import Change, Deploy, Origin, Slot
from reconciler.language.spec import Health, ServiceSpec, canonical, spec_hash
from tests.replica import memory_ledger


@dataclass
class MemoryRuntime:
    """Containers that are entries in a dict. `running` outlives an agent."""

    running: dict[str, Start] = field(default_factory=dict)
    ended: dict[str, asyncio.Future[Exit]] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    held: set[str] = field(default_factory=set)
    doomed: dict[str, int] = field(default_factory=dict)
    broken: dict[str, list[Exception]] = field(default_factory=dict)

    def _stumble(self, what: str) -> None:
        """`broken` names what fails next, and how: `start`, `wait`, `stop`, `tail`."""
        if self.broken.get(what):
            raise self.broken[what].pop()

    async def start(self, order: Start) -> None:
        """`doomed` counts the starts of a service that end at once."""
        await asyncio.sleep(0)
        self._stumble("start")
        tag = order.image.rpartition(":")[2]
        if tag == "nodefault":
            raise StartFailed("no space left on device", node_fault=True)
        self.running[order.alloc] = order
        self.started.append(order.alloc)
        self.ended[order.alloc] = asyncio.get_running_loop().create_future()
        if tag == "exits":
            self.ended[order.alloc].set_result(Exit(3, oom=False))
        if self.doomed.get(order.service):
            self.doomed[order.service] -= 1
            self.ended[order.alloc].set_result(Exit(4, oom=False))
        if tag == "oom":
            self.ended[order.alloc].set_result(Exit(137, oom=True))

    async def wait(self, alloc: str) -> Exit:
        self._stumble("wait")
        return await asyncio.shield(self.ended[alloc])

    async def stop(self, alloc: str, grace_s: float) -> None:
        self._stumble("stop")
        self.running.pop(alloc, None)
        if alloc in self.ended and not self.ended[alloc].done():
            self.ended[alloc].set_result(Exit(143, oom=False))

    async def found(self) -> list[Found]:
        return [Found(a, not self.ended[a].done()) for a in self.running]

    def target(self, order: Start) -> Target:
        tag = order.image.rpartition(":")[2]

        async def no_socket() -> object:
            raise ConnectionRefusedError(111, "Connection refused")

        async def run(argv: tuple[str, ...], timeout_s: float) -> int:
            return 1 if tag == "sick" or order.service in self.held else 0

        return Target(order.address, order.port, no_socket, run)  # type: ignore[arg-type]  # never connects

    async def tail(self, alloc: str, lines: int) -> tuple[str, ...]:
        self._stumble("tail")
        return (f"{alloc} says goodbye",)

    def kill(self, alloc: str) -> None:
        self.ended[alloc].set_result(Exit(137, oom=False))

    def cut_power(self) -> None:
        """Nothing of it is left."""
        self.running.clear()
        self.ended.clear()


class SteppedClock(RealClock):
    """The machine's clocks, the wall's set wrong by `step_ms`."""

    step_ms = 0

    def wall_ms(self) -> int:
        return super().wall_ms() + self.step_ms


class MemoryImages:
    """A registry that has everything but tags `missing` and `denied`."""

    def __init__(self) -> None:
        self.have: set[tuple[str, str]] = set()
        self.asked = 0

    async def present(self) -> tuple[tuple[str, str], ...]:
        return tuple(sorted(self.have))

    async def pull(self, order: Pull, tell: Callable[[PullReport], None]) -> None:
        self.asked += 1
        await asyncio.sleep(0)
        if order.image.endswith(":explodes"):
            raise RuntimeError("nobody thought of this")
        if order.image.endswith((":denied", ":missing")):
            tell(PullReport(image=order.image, digest=order.digest, state="failed",
                            error="the registry said 404", final=True))
            return
        self.have.add((order.image, order.digest))
        tell(PullReport(image=order.image, digest=order.digest, state="done"))


class NoLines:
    async def read(self, request: LogRequest) -> AsyncIterator[LogLine]:
        for line in ():
            yield line


@dataclass
class Node:
    """One node's agent, which can be stopped and started over the same containers."""

    name: str
    folder: Path
    address: str
    identity: object
    ledger: Ledger
    runtime: MemoryRuntime = field(default_factory=MemoryRuntime)
    images: MemoryImages = field(default_factory=MemoryImages)
    server: AgentServer | None = None
    _task: asyncio.Task[None] | None = None

    async def up(self) -> None:
        ready = asyncio.Event()
        self._task = asyncio.create_task(self._run(ready))
        await ready.wait()

    async def down(self) -> None:
        assert self.server is not None
        await self.server.stop()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, ready: asyncio.Event) -> None:
        server: AgentServer

        def tell(report: object) -> None:
            server.tell(report)  # type: ignore[arg-type]  # any report

        def beat() -> Beat:
            return Beat(at_ms=0, edge_index=self.ledger.state.index)

        async with asyncio.TaskGroup() as group:
            supervisor = Supervisor(self.runtime, self.folder, tell, time.monotonic)
            server = AgentServer(self.name, supervisor, self.images, NoLines(), beat, lambda: 0)
            self.server = server
            await supervisor.recover(group)
            i = self.identity
            await server.start(self.address, i.ca_pem, i.cert_pem, i.key_pem)  # type: ignore[attr-defined]
            ready.set()
            async for _ in self.ledger.states():
                server.beat_now()


class World:
    """Nodes, a log, and a leader that can be stopped and followed by another."""

    def __init__(self, folder: Path, nodes: int = 3) -> None:
        self.clock = SteppedClock()
        self.ledger, self.replica = memory_ledger(self.clock)
        self.authority = create_ca()
        self.folder = folder
        self.count = nodes
        self.nodes: dict[str, Node] = {}
        self._ids = itertools.count()
        self.leading: asyncio.Task[None] | None = None
        self.links: Links | None = None
        self.transfer: Transfer = stay

    def new_id(self, service: str) -> str:
        return f"{service}-{next(self._ids):06d}"

    async def up(self) -> None:
        await self.ledger.propose(c.InitCluster("test", "t", "0" * 64))
        for number in range(1, self.count + 1):
            name = f"node-{number}"
            identity = issue(self.authority, name, ("127.0.0.1",))
            address = f"unix:{self.folder}/{number}.sock"
            node = Node(name, self.folder / name, address, identity, self.ledger)
            self.nodes[name] = node
            await node.up()
            await self.ledger.propose(c.RegisterNode(
                name=name, number=number, api="127.0.0.1:1", agent=address, cpu_milli=4000,
                memory_bytes=4_000_000_000))
        self.lead()

    def lead(self) -> None:
        """A new leader of a new term."""
        self.replica.leading, self.replica.term = True, self.replica.term + 1
        self.replica.stop_after = None
        i = self.nodes["node-1"].identity
        credentials = Credentials(i.ca_pem, i.cert_pem, i.key_pem)  # type: ignore[attr-defined]
        self.links = Links(self.ledger, "node-1", credentials, self.clock)
        leader = Leader(self.ledger, self.links, self.new_id, transfer=self.transfer)
        self.leading = asyncio.create_task(leader.run(self.replica.term))

    async def unlead(self) -> None:
        assert self.leading is not None
        self.leading.cancel()
        await asyncio.gather(self.leading, return_exceptions=True)

    async def down(self) -> None:
        await self.unlead()
        for node in self.nodes.values():
            await node.down()

    async def deploy(
        self, *specs: ServiceSpec, remove: tuple[str, ...] = (), scale: bool = False
    ) -> str:
        """Start a deploy of these services, replicas over the nodes in turn; `scale` keeps what
        stands."""
        changes: list[Change] = []
        names = sorted(self.nodes)
        standing = {
            (a.service, a.slot): Slot(a.node, a.id)
            for a in self.ledger.state.allocations.values() if scale and a.live
        }
        for spec in specs:
            key = spec_hash(spec)
            await self.ledger.propose(c.StoreSpec(key, 0, 1, canonical(spec)))
            known = self.ledger.state.services.get(spec.name)
            live = known.live if known else 0
            changes.append(Change(
                service=spec.name, action="update" if live else "create", spec_hash=key,
                digest="sha256:" + key, from_revision=live,
                to_revision=(known.last_revision if known else 0) + 1, strategy="surge",
                slots=tuple(standing.get((spec.name, n), Slot(names[n % len(names)]))
                            for n in range(spec.replicas)),
            ))
        for name in remove:
            live = self.ledger.state.services[name].live
            changes.append(Change(service=name, action="remove", from_revision=live))
        index = await self.ledger.propose(c.StartDeploy(
            changes=tuple(changes), origin=Origin(), budget_ms=60_000))
        return f"d-{index}"

    async def ended(self, deploy: str, within_s: float = 60.0) -> Deploy:
        async with asyncio.timeout(within_s):
            state = await self.ledger.until(lambda s: s.deploys[deploy].finished)
        return state.deploys[deploy]

    def containers(self) -> dict[str, str]:
        """Allocation → node of all that runs."""
        return {a: n.name for n in self.nodes.values() for a in n.runtime.running}

    def phases(self, deploy: str) -> list[str]:
        """The stream's phases, in order."""
        return [str(e.wire().get("phase", e.kind))
                for e in self.ledger.state.deploy_events[deploy]]


def service(name: str, tag: str = "ok", **changes: object) -> ServiceSpec:
    """A service whose health is a command that its tag decides."""
    health = Health(kind="command", command=("check",), interval_ms=100, deadline_ms=2_000)
    fields: dict[str, object] = {
        "name": name, "image": f"registry/{name}:{tag}", "health": health, "port": 80,
        "bake_ms": 50, "stop_timeout_ms": 100, **changes,
    }
    return ServiceSpec(**fields)  # type: ignore[arg-type]  # the test names the fields


@contextlib.asynccontextmanager
async def world(folder: Path, nodes: int = 3) -> AsyncIterator[World]:
    """A world that is up, and gone at the end."""
    it = World(folder, nodes)
    await it.up()
    try:
        yield it
    finally:
        await it.down()
