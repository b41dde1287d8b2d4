"""Nodes of one process with the real API, ledger and state machine over one log in memory.

`SharedLog` stands for the replicated log; `WrittenDeploys` stands for the executor and writes the
commands that it would write.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import socket
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import httpx
import msgspec

from reconciler.api.server import Server
from reconciler.api.services import Ask, Backend, LogLine
from reconciler.api.stream import Decoder, Message
from reconciler.api.tls import client_context, server_context
from reconciler.api.types import Placement, Plan, ServicePlan
from reconciler.clock import FakeClock
from reconciler.edge.certificates import (
    Authority,
    CsrSigner,
    Identity,
    create_ca,
    issue,
    write_identity,
)
from reconciler.errors import Conflict, Unavailable, Unprocessable
from reconciler.executor.authority import ClusterAuthority, found_authority
from reconciler.executor.drains import Nodes
from reconciler.executor.history import History
from reconciler.executor.joining import Joining
from reconciler.executor.ledger import Ledger, StateMachine
from reconciler.executor.requests import DeployRequest
from reconciler.fsm import commands as c
from reconciler.fsm.events import Pulling
from reconciler.fsm.records import (
    Allocation,
    Change,
    Failure,
    Origin,
    SecretPin,
    Slot,
    Source,
    Token,
)
from reconciler.fsm.state import State
from reconciler.language.problems import InvalidManifest, Problem
from reconciler.language.spec import Health, ServiceSpec, canonical, spec_hash
from reconciler.log.archive import NotHeld, Past
from reconciler.log.settings import Member

TOKENS = {"admin": "mill-admin-token", "deploy": "mill-deploy-token", "read": "mill-read-token"}
KEY = bytes(range(32))
WAIT_S = 30.0


class SharedLog:
    """One log for all nodes. Who is in `lagging` applies nothing until `catch_up`."""

    def __init__(self) -> None:
        self.entries: list[bytes] = []
        self.leader: str | None = "node-1"
        self.majority = True
        self.lagging: set[str] = set()
        self.oldest = 0
        self.base: bytes | None = None
        self.nodes: dict[str, tuple[StateMachine, Ledger, list[int]]] = {}

    def join(self, name: str, clock: FakeClock) -> Ledger:
        machine = StateMachine()
        ledger = Ledger(NodeReplica(self, name), machine, clock)
        self.nodes[name] = (machine, ledger, [0])
        self.catch_up(name)
        return ledger

    def catch_up(self, name: str) -> object:
        machine, ledger, applied = self.nodes[name]
        result: object = None
        while applied[0] < len(self.entries):
            applied[0] += 1
            result = machine.apply(applied[0], self.entries[applied[0] - 1])
        ledger.woken(applied[0])
        return result

    def forget(self) -> None:
        """Hold no past before now."""
        self.oldest, self.base = len(self.entries), self.nodes[self.leader or ""][0].dump()

    def install_snapshot(self, name: str, source: str) -> None:
        """`name` takes over the whole state of `source` at once, skipping the entries."""
        machine, ledger, applied = self.nodes[name]
        machine.load(self.nodes[source][0].dump())
        applied[0] = len(self.entries)
        ledger.woken(applied[0])

    def append(self, command: bytes) -> tuple[int, object]:
        self.entries.append(command)
        index, results = len(self.entries), {}
        for name in self.nodes:
            if name not in self.lagging:
                results[name] = self.catch_up(name)
        return index, results[self.leader or ""]


@dataclass
class NodeReplica:
    """One node's view of the shared log."""

    log: SharedLog
    name: str
    term: int = 1

    @property
    def is_leader(self) -> bool:
        return self.log.leader == self.name

    @property
    def leader(self) -> str | None:
        return self.log.leader

    async def propose(self, command: bytes, timeout_s: float = 10.0) -> tuple[int, object]:
        await asyncio.sleep(0)
        self._check()
        return self.log.append(command)

    async def read_index(self, timeout_s: float = 5.0) -> int:
        await asyncio.sleep(0)
        self._check()
        return len(self.log.entries)

    async def history(self, index: int) -> Past:
        """As the real log: only what `forget` left, from a snapshot on."""
        await asyncio.sleep(0)
        log = self.log
        if index > len(log.entries):
            raise Unprocessable(f"index {index} is not there yet; at {len(log.entries)}")
        if index < log.oldest:
            raise NotHeld(index, log.oldest)
        return Past(log.oldest, log.base, [
            (number, log.entries[number - 1]) for number in range(log.oldest + 1, index + 1)
        ])

    def _check(self) -> None:
        if not self.is_leader:
            raise Unavailable("this node does not lead")
        if not self.log.majority:
            raise Unavailable("no majority of the log's nodes answered")


def spec(name: str, **fields: object) -> ServiceSpec:
    return ServiceSpec(name=name, image=f"registry.test/{name}:v1", port=3000,
                       health=Health(kind="tcp"), **fields)  # type: ignore[arg-type]  # any field of a spec


@dataclass
class WrittenDeploys:
    """Admits lines of `service NAME [SECRET]`; refuses what holds `wrong` or `huge`."""

    ledger: Ledger
    requests: list[DeployRequest] = field(default_factory=list)
    asks: list[tuple[object, ...]] = field(default_factory=list)
    pulls: asyncio.Queue[Pulling] = field(default_factory=asyncio.Queue)

    async def plan(self, request: DeployRequest) -> msgspec.Struct:
        changes = self._changes(request)
        return Plan(services=tuple(
            ServicePlan(name=ch.service, action=ch.action, changes=(), strategy="surge",
                        reason="it fits", image=f"registry.test/{ch.service}:v1@{ch.digest}",
                        placements=tuple(Placement(s.node, bool(s.keep)) for s in ch.slots))
            for ch in changes
        ))

    async def start(self, request: DeployRequest) -> str:
        self.requests.append(request)
        for deploy in self.ledger.state.deploys.values():
            if request.key and deploy.key == request.key:
                return deploy.id
        return await self.begin(self._changes(request), request.origin, request.key)

    async def begin(self, changes: tuple[Change, ...], origin: Origin, key: str = "") -> str:
        for change in changes:
            if change.action != "unchanged":
                made = spec(change.service)
                await self.ledger.propose(c.StoreSpec(spec_hash(made), 0, 1, canonical(made)))
        index = await self.ledger.propose(
            c.StartDeploy(changes=changes, origin=origin, budget_ms=60_000, key=key)
        )
        return f"d-{index}"

    def _changes(self, request: DeployRequest) -> tuple[Change, ...]:
        text = b"\n".join(request.files.values()).decode()
        if "wrong" in text:
            raise InvalidManifest([Problem("web.mill", 3, 7, "unknown attribute", "remove it"),
                                   Problem("web.mill", 9, 1, "no image")])
        if "huge" in text:
            raise Conflict("web does not fit: 4 cores short", hint="nearest: node-1")
        changes = []
        for line in text.splitlines():
            _, name, *secrets = line.split()
            live = self.ledger.state.services.get(name)
            number = live.live if live else 0
            changes.append(Change(
                service=name, action="update" if number else "create", digest="sha256:" + "a" * 64,
                spec_hash=spec_hash(spec(name)), from_revision=number, to_revision=number + 1,
                secrets=tuple(SecretPin(s, 1) for s in secrets), strategy="surge",
                slots=(Slot("node-1"),),
            ))
        return tuple(changes)

    async def cancel(self, deploy_id: str) -> None:
        failure = Failure(reason="cancelled", cancelled=True)
        await self.ledger.propose(c.RollBackDeploy(deploy_id, failure))

    async def scale(self, name: str, replicas: int, ask: Ask) -> str:
        self.asks.append(("scale", name, replicas, ask))
        return await self._unchanged(name, "scale")

    async def restart(self, name: str, ask: Ask) -> str:
        self.asks.append(("restart", name, ask))
        return await self._unchanged(name, "restart")

    async def rollback(self, name: str, to: int | None, ask: Ask) -> str:
        self.asks.append(("rollback", name, to, ask))
        return await self._unchanged(name, "rollback")

    async def _unchanged(self, name: str, kind: str) -> str:
        live = self.ledger.state.services[name].live
        change = Change(service=name, action="unchanged", from_revision=live, to_revision=live)
        deploy_id = await self.begin((change,), Origin(kind=kind))  # type: ignore[arg-type]  # one of three
        await self.ledger.propose(c.FinishDeploy(deploy_id))
        return deploy_id

    async def progress(self, deploy_id: str) -> AsyncIterator[Pulling]:
        while True:
            yield await self.pulls.get()

    async def schedule(self, deploy_id: str) -> list[Allocation]:
        """Up to the running pulls."""
        propose, deploy = self.ledger.propose, self.ledger.state.deploys[deploy_id]
        await propose(c.BeginPulls(deploy_id))
        for change in deploy.changes:
            for number, slot in enumerate(change.slots):
                await propose(c.ScheduleAlloc(
                    alloc=f"{change.service}-{deploy_id[2:]:0>5}{number}", service=change.service,
                    node=slot.node, slot=number, deploy=deploy_id,
                ))
        return list(self.ledger.state.of_deploy(deploy_id))

    async def finish(self, deploy_id: str) -> None:
        """From the pulls to `done`."""
        propose = self.ledger.propose
        for alloc in self.ledger.state.of_deploy(deploy_id):
            await propose(c.RecordPull(deploy_id, alloc.image, alloc.node, cached=False))
        await propose(c.FinishPulls(deploy_id))
        for alloc in self.ledger.state.of_deploy(deploy_id):
            await propose(c.SetAllocStatus(alloc=alloc.id, status="starting", was="pending"))
            await propose(c.SetAllocStatus(alloc=alloc.id, status="running", was="starting"))
            await propose(c.SetAllocStatus(alloc=alloc.id, status="healthy", was="running",
                                           elapsed_ms=1200))
            await propose(c.PassService(deploy_id, alloc.service, 1200))
        await propose(c.CommitDeploy(deploy_id))
        await propose(c.RouteDeploy(deploy_id))
        await propose(c.FinishDeploy(deploy_id))


@dataclass
class WrittenLogs:
    """Lines by allocation; `live` are added while somebody follows."""

    lines: dict[str, list[LogLine]] = field(default_factory=dict)
    live: dict[str, asyncio.Queue[LogLine]] = field(default_factory=dict)
    refuse: set[str] = field(default_factory=set)
    reading: set[str] = field(default_factory=set)

    async def follow(self, alloc: Allocation, tail: int, follow: bool) -> AsyncIterator[LogLine]:
        if alloc.id in self.refuse:
            raise Unavailable(f"{alloc.node} does not answer")
        self.reading.add(alloc.id)
        try:
            for line in self.lines.get(alloc.id, [])[-tail:] if tail else []:
                yield line
            while follow:
                yield await self.live.setdefault(alloc.id, asyncio.Queue()).get()
        finally:
            self.reading.discard(alloc.id)


@dataclass
class WrittenSources:
    """Writes what the git loop would write."""

    ledger: Ledger
    synced: list[tuple[str, bool, bool]] = field(default_factory=list)
    removed: list[tuple[str, bool]] = field(default_factory=list)

    async def add(self, source: Source) -> None:
        await self.ledger.propose(c.PutSource(source))

    async def sync(self, name: str, allow_empty: bool, retry: bool) -> None:
        self.synced.append((name, allow_empty, retry))

    async def remove(self, name: str, prune: bool) -> None:
        self.removed.append((name, prune))
        await self.ledger.propose(c.RemoveSource(name))

    def next_poll_ms(self, name: str) -> int | None:
        return 1_700_000_010_000


@dataclass
class Seen:
    """What the leader sees of nodes."""

    edge: dict[str, str] = field(default_factory=dict)
    log: dict[str, str] = field(default_factory=dict)
    learners: set[str] = field(default_factory=set)

    def last_seen(self, node: str) -> int | None:
        return 1_700_000_000_500

    def edge_error(self, node: str) -> str:
        return self.edge.get(node, "")

    def log_error(self, node: str) -> str:
        return self.log.get(node, "")

    def voter(self, node: str) -> bool:
        return node not in self.learners


@dataclass
class Node:
    """One node's parts, its server and its address."""

    name: str
    ledger: Ledger
    deploys: WrittenDeploys
    logs: WrittenLogs
    sources: WrittenSources
    health: Seen
    clock: FakeClock
    server: Server
    port: int = 0
    plain_port: int = 0
    tls: bool = False

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def state(self) -> State:
        return self.ledger.state


AUTHORITY = create_ca()
"""Of all clusters here: making one costs more than a test of it."""


class Cluster:
    """Nodes on one log; `node-1` leads at first. The first holds the tokens' hashes in the log.

    With `tls` each node guards its API, and says so in its address, since all are on loopback.
    """

    def __init__(self, tls: bool = False) -> None:
        self.log = SharedLog()
        self.clock = FakeClock()
        self.nodes: list[Node] = []
        self.clients: list[httpx.AsyncClient] = []
        self.authority: Authority = AUTHORITY
        self.folder = tempfile.TemporaryDirectory() if tls else None
        self._drawn = itertools.count(1)

    async def start(self, count: int, heartbeat_s: float = 15.0) -> None:
        for number in range(1, count + 1):
            node = self._node(f"node-{number}", heartbeat_s)
            self.nodes.append(node)
            if self.folder is None:
                node.port = await node.server.start()
            else:
                await self._start_guarded(node)
        leader = self.nodes[0].ledger
        digest = hashlib.sha256(TOKENS["admin"].encode()).hexdigest()
        await leader.propose(c.InitCluster("mill-test", "t-admin", digest))
        for number, node in enumerate(self.nodes, 1):
            await leader.propose(c.RegisterNode(
                name=node.name, number=number, agent=f"127.0.0.1:{number}", log="",
                api=node.url if node.tls else f"127.0.0.1:{node.port}",
                cpu_milli=4_000, memory_bytes=8_000_000_000,
            ))

    def identity(self, node: Node, **fields: object) -> tuple[Path, Path, Identity]:
        """A new certificate of a node: its files, and what is in them."""
        assert self.folder is not None
        identity = issue(self.authority, node.name, ("127.0.0.1",), **fields)  # type: ignore[arg-type]  # the test's own
        folder = Path(self.folder.name) / f"{node.name}-{next(self._drawn)}"
        folder.mkdir()
        write_identity(folder, identity)
        return folder / "cert.pem", folder / "key.pem", identity

    async def _start_guarded(self, node: Node) -> None:
        cert, key, _ = self.identity(node)
        plain = socket.create_server(("127.0.0.1", 0))
        node.plain_port, node.tls = plain.getsockname()[1], True
        node.port = await node.server.start(tls=server_context(cert, key), plain=[plain])

    async def found_authority(self) -> None:
        """As the founding leader does: from then on machines can join."""
        await found_authority(self.nodes[0].ledger, self.authority.cert_pem,
                              self.authority.key_pem, KEY)

    def random(self, count: int) -> bytes:
        """Other bytes each time, and the same ones in each run."""
        return hashlib.shake_256(str(next(self._drawn)).encode()).digest(count)

    def _members(self) -> tuple[tuple[Member, bool], ...]:
        return tuple((Member(node.name, "127.0.0.1", node.port), True) for node in self.nodes)

    def _node(self, name: str, heartbeat_s: float) -> Node:
        ledger = self.log.join(name, self.clock)
        deploys, sources = WrittenDeploys(ledger), WrittenSources(ledger)
        logs, health = WrittenLogs(), Seen()
        backend = Backend(
            node=name, ledger=ledger, history=History(NodeReplica(self.log, name)),
            deploys=deploys, logs=logs, sources=sources, health=health,
            cluster_key=KEY, clock=self.clock, random_bytes=self.random, nodes=Nodes(ledger),
            joining=Joining(ledger, ClusterAuthority(ledger, CsrSigner(), KEY), CsrSigner(),
                            self._members, self.authority.cert_pem),
            ca=self.authority.cert_pem,
        )
        return Node(name, ledger, deploys, logs, sources, health, self.clock,
                    Server(backend, heartbeat_s))

    def grant(self, role: Literal["deploy", "read"]) -> None:
        """A token of a lesser role, put into the states at once."""
        digest = hashlib.sha256(TOKENS[role].encode()).hexdigest()
        token = Token(id=f"t-{role}", sha256=digest, role=role)
        for machine, _, _ in self.log.nodes.values():
            machine.state = msgspec.structs.replace(
                machine.state, tokens={**machine.state.tokens, token.id: token}
            )

    def client(self, node: int = 0, token: str | None = "admin") -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {TOKENS.get(token, token)}"} if token else {}
        client = httpx.AsyncClient(base_url=self.nodes[node].url, headers=headers, timeout=WAIT_S,
                                   verify=client_context(self.authority.cert_pem))
        self.clients.append(client)
        return client

    async def stop(self) -> None:
        for client in self.clients:
            await client.aclose()
        await asyncio.gather(*(node.server.stop() for node in self.nodes))
        if self.folder is not None:
            self.folder.cleanup()


async def told(answer: httpx.Response, decoder: Decoder | None = None) -> AsyncIterator[Message]:
    """The messages of a live stream as they come."""
    decoder = decoder or Decoder()
    async for piece in answer.aiter_bytes():
        for message in decoder.feed(piece):
            yield message


def read(answer: httpx.Response) -> list[Message]:
    """The messages of a stream that has ended."""
    return list(Decoder().feed(answer.content))


async def deployed(cluster: Cluster, text: str = "service web") -> str:
    """A deploy that went through, and its id."""
    deploys = cluster.nodes[0].deploys
    deploy_id = await deploys.start(DeployRequest(files={"web.mill": text.encode()}))
    await deploys.schedule(deploy_id)
    await deploys.finish(deploy_id)
    return deploy_id
