"""One node of mill as a process, without containers and edge: log, leader's loops, agent, API.

`python -m tests.proof.member CONFIG.json`. Containers are entries in a dict; each order that its
agent obeys, and each change of its leadership, is a line of `deeds.jsonl` in its folder.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextvars import ContextVar
from pathlib import Path
from typing import Literal

import grpc
import msgspec
import structlog

from reconciler.api.server import Server
from reconciler.api.services import Backend, LogLine
from reconciler.api.tls import server_context
from reconciler.clock import RealClock
from reconciler.edge.certificates import load_identity
from reconciler.executor.admit import Admission
from reconciler.executor.agent.orders import AllocReport, Beat, Order, Pull, Report, Start
from reconciler.executor.agent.server import AgentServer
from reconciler.executor.agent.supervise import Supervisor
from reconciler.executor.agent.terms import Terms
from reconciler.executor.front import Front
from reconciler.executor.history import History
from reconciler.executor.leader import Leader
from reconciler.executor.ledger import CommandRefused, Ledger, StateMachine
from reconciler.executor.links import Credentials, Link, Links
from reconciler.executor.reading import Reader
from reconciler.fsm import commands as c
from reconciler.fsm.records import Allocation, Secret
from reconciler.fsm.seal import unseal
from reconciler.fsm.state import State
from reconciler.log.elections import Elections
from reconciler.log.replica import Member, Replica, Settings, Timing
from reconciler.node_backend import Deploys
from tests.executor.world import MemoryImages, MemoryRuntime, NoLines

MUTANT = "MILL_PROOF_MUTANT"
SKIP_READ_INDEX = "reads-skip-the-read-index"
NO_PRE_VOTE = "elections-without-pre-vote"
STUBBORN = "MILL_PROOF_STUBBORN"
STUBBORN_S = 60.0
API, LOG, AGENT = 4400, 4401, 4402  # contracts: Ports
TOKEN_ID = "proof"
SWITCH_S = 0.0005

log = structlog.get_logger("mill.proof")


def new_id(service: str) -> str:
    """An allocation's."""
    return f"{service}-{secrets.token_hex(3)}"


class Config(msgspec.Struct, frozen=True):
    """`members` are names and hosts, in the order of their numbers; `stop_file`: see
    `Stops`."""

    name: str
    folder: str
    members: tuple[tuple[str, str], ...]
    token: str
    stop_file: str

    @property
    def host(self) -> str:
        """This node's own."""
        return dict(self.members)[self.name]


What = Literal["start", "stop", "pull", "led", "left", "held"]
Moment = Literal["decided", "told"]


class Deed(msgspec.Struct, frozen=True):
    """What a node did, when (monotonic seconds), in which term: an order obeyed (start, stop,
    pull), leadership gained or lost, or stopped by itself with an order in its hands (`held`)."""

    at: float
    node: str
    term: int
    what: What
    alloc: str = ""


_obeying: ContextVar[int] = ContextVar("_obeying", default=0)


class Deeds:
    """Appends to the file, line by line, past a SIGKILL."""

    def __init__(self, config: Config) -> None:
        self._node = config.name
        path = Path(config.folder) / "deeds.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def add(self, what: What, term: int, alloc: str = "") -> None:
        """It happens now."""
        deed = Deed(time.monotonic(), self._node, term, what, alloc)
        os.write(self._file, msgspec.json.encode(deed) + b"\n")


class Stops:
    """Two moments at which a pause of the leader hurts most, for who writes one of their names to
    the stop file: it has decided what to order and not said it yet (`decided`); or its own agent
    has been told and not looked at it yet (`told`)."""

    def __init__(self, config: Config, deeds: Deeds) -> None:
        self._file, self._deeds = Path(config.stop_file), deeds

    def at(self, moment: Moment, order: Order) -> None:
        """SIGSTOP of this process with its first start order since this was asked for."""
        if not isinstance(order, Start) or not self._file.exists():
            return
        if self._file.read_text() == moment:
            self._file.unlink()
            self._deeds.add("held", order.term, order.alloc)
            os.kill(os.getpid(), signal.SIGSTOP)

    def before_sending(self) -> None:
        """Put `decided` in the way of `Link.send`."""
        send = Link.send

        def stopping(link: Link, order: Order) -> None:
            self.at("decided", order)
            send(link, order)

        setattr(Link, "send", stopping)  # noqa: B010  # a method is replaced, on purpose

    async def on_arrival(self, orders: AsyncIterator[Order]) -> AsyncIterator[Order]:
        """Put `told` in the way of a session."""
        async for order in orders:
            self.at("told", order)
            yield order


class WatchedAgent(AgentServer):
    """The agent's own door; each order knows the term of the session that brought it."""

    stops: Stops

    async def _session(
        self, orders: AsyncIterator[Order], context: grpc.aio.ServicerContext[Order, Report]
    ) -> AsyncIterator[Report]:
        reports = super()._session(self.stops.on_arrival(orders), context)
        async for report in reports:
            yield report

    async def _obey(self, orders: AsyncIterator[Order], term: int) -> None:
        _obeying.set(term)
        await super()._obey(orders, term)


class Watched:
    """The supervisor and the images behind the door, every order written down as it is obeyed."""

    def __init__(self, supervisor: Supervisor, images: MemoryImages, deeds: Deeds) -> None:
        self._supervisor, self._images, self._deeds = supervisor, images, deeds

    def inventory(self) -> tuple[AllocReport, ...]:
        return self._supervisor.inventory()

    def start(self, order: Start) -> None:
        self._deeds.add("start", _obeying.get(), order.alloc)
        self._supervisor.start(order)

    def stop(self, alloc: str, *, kill: bool) -> None:
        self._deeds.add("stop", _obeying.get(), alloc)
        self._supervisor.stop(alloc, kill=kill)

    async def present(self) -> tuple[tuple[str, str], ...]:
        return await self._images.present()

    async def pull(self, order: Pull, tell: object) -> None:
        self._deeds.add("pull", _obeying.get())
        await self._images.pull(order, tell)  # type: ignore[arg-type]  # passed on as it is


class OnePlace:
    """A registry: every image is there, its digest that of its name."""

    @staticmethod
    async def resolve(image: str, _auth: str | None) -> str:
        return "sha256:" + hashlib.sha256(image.encode()).hexdigest()


class NoView:
    """Nothing is known of other nodes beyond the log."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def last_seen(self, node: str) -> int | None:
        return None

    def edge_error(self, node: str) -> str:
        return ""

    def log_error(self, node: str) -> str:
        return self._replica.closed

    def voter(self, node: str) -> bool:
        return True


class NoLogs:
    """Containers that are entries in a dict write nothing."""

    async def follow(self, alloc: Allocation, tail: int, follow: bool) -> AsyncIterator[LogLine]:
        nothing: tuple[LogLine, ...] = ()
        for line in nothing:
            yield line


class LeapingLedger(Ledger):
    """The mutant: a leader that answers reads without asking anybody whether it still leads."""

    async def read(self) -> State:
        return self.state


class Node:
    """The parts, put together as `reconciler.node` does."""

    def __init__(self, config: Config) -> None:
        self.config, self.folder = config, Path(config.folder)
        self.clock, self.deeds = RealClock(), Deeds(config)
        self.identity = load_identity(self.folder / "identity")
        self.key = (self.folder / "cluster.key").read_bytes()
        self.machine = StateMachine()
        self.replica = Replica(self._settings(), self.machine)
        skips = os.environ.get(MUTANT) == SKIP_READ_INDEX
        self.ledger = (LeapingLedger if skips else Ledger)(
            self.replica, self.machine, self.clock)
        self.credentials = Credentials(
            self.identity.ca_pem, self.identity.cert_pem, self.identity.key_pem)
        self.links: Links | None = None
        self.reader = Reader()
        admission = Admission(self.ledger.read, self.reader, OnePlace.resolve, self._open)
        self.front = Front(self.ledger, admission, lambda: self.links)
        self.runtime, self.images = MemoryRuntime(), MemoryImages()
        self._led, self._term = asyncio.Event(), 0

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`."""
        await self.replica.start()
        self.replica.on_applied(self.ledger.woken)
        self.replica.on_leadership(self._on_leadership)
        api = Server(self._backend())
        async with asyncio.TaskGroup() as group:
            agent, supervisor = await self._agent(group)
            tasks = [group.create_task(self._lead_when_elected()),
                     group.create_task(self._beat(agent))]
            identity = self.folder / "identity"
            await api.start(host=self.config.host, port=API,
                            tls=server_context(identity / "cert.pem", identity / "key.pem"))
            log.info("serving", node=self.config.name)
            await stop.wait()
            await api.stop()
            await self.replica.stop()
            await agent.stop()
            for task in (*tasks, *supervisor.tasks()):
                task.cancel()
        await self.reader.close()

    def _settings(self) -> Settings:
        members = tuple(Member(name, host, LOG) for name, host in self.config.members)
        me = next(member for member in members if member.name == self.config.name)
        identity = self.folder / "identity"
        # To let go without a majority is a courtesy: safety must not rest on it.
        timing = Timing(step_down_s=STUBBORN_S) if os.environ.get(STUBBORN) else Timing()
        return Settings(self.folder / "log", me, members, identity / "ca.pem",
                        identity / "cert.pem", identity / "key.pem", timing=timing)

    def _open(self, secret: Secret) -> str:
        newest = secret.versions[-1]
        return unseal(self.key, newest.nonce, secret.name, newest.sealed)

    def _backend(self) -> Backend:
        return Backend(
            node=self.config.name, ledger=self.ledger, history=History(self.replica),
            deploys=Deploys(self.front), logs=NoLogs(),
            sources=None,  # type: ignore[arg-type]  # nobody asks for any here
            health=NoView(self.replica), cluster_key=self.key, clock=self.clock,
            random_bytes=os.urandom, ca=self.identity.ca_pem,
        )

    async def _agent(self, group: asyncio.TaskGroup) -> tuple[AgentServer, Supervisor]:
        def tell(report: Report) -> None:
            agent.tell(report)

        supervisor = Supervisor(self.runtime, self.folder / "allocs", tell, time.monotonic)
        watched = Watched(supervisor, self.images, self.deeds)
        agent = WatchedAgent(
            self.config.name, watched, watched, NoLines(),
            lambda: Beat(at_ms=self.clock.wall_ms(), edge_index=self.ledger.state.index),
            lambda: self.replica.term, nodes=lambda: self.ledger.state.nodes,
            kept=Terms(self.folder / "agent.term"), confirm=self.replica.confirm_leader)
        agent.stops = Stops(self.config, self.deeds)
        agent.stops.before_sending()
        await supervisor.recover(group)
        await agent.start(f"{self.config.host}:{AGENT}", self.identity.ca_pem,
                          self.identity.cert_pem, self.identity.key_pem,
                          behind=self.folder / "agent.sock")
        return agent, supervisor

    async def _beat(self, agent: AgentServer) -> None:
        async for _ in self.ledger.states():
            agent.beat_now()
            await asyncio.sleep(0.05)

    # -- leading ---------------------------------------------------------------------------

    def _on_leadership(self, leading: bool, term: int) -> None:
        self.deeds.add("led" if leading else "left", term)
        self._term = term if leading else 0
        self._led.set()

    async def _lead_when_elected(self) -> None:
        current: asyncio.Task[None] | None = None
        if self.replica.is_leader:
            self._on_leadership(True, self.replica.term)
        while True:
            await self._led.wait()
            self._led.clear()
            if current is not None:
                current.cancel()
                await asyncio.gather(current, return_exceptions=True)
                current, self.links = None, None
            if self._term:
                current = asyncio.create_task(self._lead(self._term))

    async def _lead(self, term: int) -> None:
        self.links = Links(self.ledger, self.config.name, self.credentials, self.clock,
                           led=lambda: self.replica.is_followed)
        await Leader(self.ledger, self.links, new_id, others=(self._found,)).run(term)

    async def _found(self, _term: int) -> None:
        if not self.ledger.state.cluster:
            digest = hashlib.sha256(self.config.token.encode()).hexdigest()
            try:
                await self.ledger.propose(c.InitCluster("proof", TOKEN_ID, digest))
            except CommandRefused:
                log.info("founded_already")
        for number, (name, host) in enumerate(self.config.members, 1):
            if name not in self.ledger.state.nodes:
                await self.ledger.propose(c.RegisterNode(
                    name=name, number=number, api=f"{host}:{API}", agent=f"{host}:{AGENT}",
                    log=f"{host}:{LOG}", cpu_milli=64_000,
                    memory_bytes=64_000_000_000))
        await asyncio.Event().wait()


def elect_without_asking() -> None:
    """The mutant: who hears no leader holds an election at once, as plain Raft does."""
    setattr(Elections, "may_stand", property(lambda _: True))  # noqa: B010  # replaced on purpose


async def serve(config: Config) -> None:
    """Until SIGTERM."""
    if os.environ.get(MUTANT) == NO_PRE_VOTE:
        elect_without_asking()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    node = Node(config)
    await node.run(stop)


def main(argv: list[str]) -> int:
    """0 after SIGTERM."""
    sys.setswitchinterval(SWITCH_S)  # as the node does
    asyncio.run(serve(msgspec.json.decode(Path(argv[0]).read_bytes(), type=Config)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
