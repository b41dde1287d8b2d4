"""One life of one node's process: the real leader loops, supervisor and agent over its log.

What `reconciler.node.Node` does with sockets and containerd, this does with the world.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

import msgspec

from reconciler.edge.table import edge_table
from reconciler.errors import MillError
from reconciler.executor.admit import Admission
from reconciler.executor.agent.orders import AllocReport, Beat, Report, Start
from reconciler.executor.agent.server import AgentServer
from reconciler.executor.agent.supervise import Supervisor
from reconciler.executor.containerd.registry import PullFailed
from reconciler.executor.drain import leave
from reconciler.executor.drains import Nodes
from reconciler.executor.front import Front
from reconciler.executor.leader import Leader
from reconciler.executor.ledger import CommandRefused, Ledger, StateMachine
from reconciler.executor.links import Links
from reconciler.executor.membership import Membership
from reconciler.fsm import commands as c
from reconciler.fsm.records import Secret
from reconciler.language.read import Position, Reading
from reconciler.language.spec import Manifest, ServiceSpec
from reconciler.log.settings import Member
from reconciler.node_following import until_removed
from reconciler.node_leading import Leading
from reconciler.node_members import LogMembers
from reconciler.node_removal import ALONE_S, ANSWER_S, ANYHOW_S
from tests.sim.whole.containers import GONE, tag_of
from tests.sim.whole.loop import SimLoop
from tests.sim.whole.replica import SimReplica
from tests.sim.whole.streams import SESSION_TERM, SimCredentials

if TYPE_CHECKING:
    from tests.sim.whole.world import WholeNode

EDGE_S = (0.0, 0.02, 0.2)
"""How long an edge takes to serve what the state says."""


class SimClock:
    """Implements `reconciler.clock.Clock`; a node's wall clock may be set wrong."""

    def __init__(self, node: WholeNode) -> None:
        self._node = node

    def wall_ms(self) -> int:
        """Milliseconds since the epoch, as this node has it."""
        return 1_700_000_000_000 + round(self._node.world.now_s * 1000) + self._node.wall_off_ms

    def monotonic(self) -> float:
        """Seconds since the world began."""
        return self._node.world.now_s


class WatchedMachine(StateMachine):
    """The real machine; each state is shown to the world's promises."""

    def __init__(self, node: WholeNode) -> None:
        super().__init__()
        self._node = node

    def apply(self, index: int, command: bytes) -> object:
        self._node.world.invariants.applied(self._node.name, index, command)
        before = self._newest
        result = super().apply(index, command)
        self._node.world.promises.applied(self._node.name, before, self._newest)
        return result

    def load(self, snapshot: bytes) -> None:
        super().load(snapshot)
        self._node.world.promises.loaded(self._node.name, self._newest)


class Obeyed(Supervisor):
    """The real supervisor; each order that reaches it is shown to the world's promises."""

    watched: WholeNode

    def start(self, order: Start) -> None:
        self.watched.world.promises.obeys(self.watched, SESSION_TERM.get())
        super().start(order)

    def stop(self, alloc: str, *, kill: bool) -> None:
        self.watched.world.promises.obeys(self.watched, SESSION_TERM.get())
        super().stop(alloc, kill=kill)


class Guarded(AgentServer):
    """The real agent; who calls is known without a certificate."""

    def _caller(self, context: Any) -> str:
        return str(context.caller)


class SimReads:
    """Manifests as people of this world write them: encoded specs."""

    async def read(self, files: Mapping[str, bytes], variables: Mapping[str, str]) -> Reading:
        specs = msgspec.msgpack.decode(files["app.mill"], type=tuple[ServiceSpec, ...])
        here = {spec.name: {"": Position("app.mill", 1, 1)} for spec in specs}
        return Reading(Manifest(tuple(sorted(specs, key=lambda s: s.name))), positions=here)


def digest_of(image: str) -> str:
    """What a tag stands for."""
    return "sha256:" + image.encode().hex().ljust(64, "0")[:64]


class SimLeading(Leading):
    """How a node comes to lead and ceases to is the real code; the loops' ends are the world's."""

    def __init__(self, process: Process) -> None:
        # None of the real one's parts: not super().__init__.
        self._process = process
        self.replica = process.replica  # type: ignore[assignment]  # the world's
        self.ledger = process.ledger
        self.links, self.sources = None, None
        self._led = asyncio.Event()
        self._term = None

    async def _lead(self, term: int) -> None:
        process = self._process
        world = process.world
        self.links = Links(self.ledger, process.name, SimCredentials(world.streams, process),
                           process.clock, led=lambda: process.replica.is_followed)
        members = process.members
        others = (self._found, Membership(self.ledger, members, process.name).run)
        await Leader(self.ledger, self.links, world.new_id, others=others,
                     transfer=members.transfer).run(term)

    async def _found(self, _term: int) -> None:
        founding = not self.ledger.state.cluster
        for number, member in enumerate(self._process.world.founding, start=1):
            if founding and member.name not in self.ledger.state.nodes:
                await self.ledger.propose(c.RegisterNode(
                    name=member.name, number=number, **where(member)))
        if founding:
            with contextlib.suppress(CommandRefused):
                await self.ledger.propose(c.InitCluster("sim", "t", "0" * 64))
        await asyncio.Event().wait()


class Capacity(TypedDict):
    """What every machine says of itself when it is founded or joins."""

    api: str
    agent: str
    log: str
    cpu_milli: int
    memory_bytes: int


def where(member: Member) -> Capacity:
    """Where it is found, and what it has room for."""
    host = member.host
    return Capacity(api=f"{host}:4400", agent=f"{host}:4402", log=f"{host}:{member.port}",
                    cpu_milli=4000, memory_bytes=4_000_000_000)


class Process:
    """Born with its node's start, ended by `SimNode.kill` and by nothing else."""

    def __init__(self, node: WholeNode) -> None:
        self.node, self.world, self.name = node, node.world, node.name
        self.loop = SimLoop(lambda: node.world.now_s, node.world.fail)
        self.clock = SimClock(node)
        self.machine = WatchedMachine(node)
        self.replica = SimReplica(node, self.loop)
        self.ledger = Ledger(self.replica, self.machine, self.clock)
        self.members = LogMembers(self.replica)  # type: ignore[arg-type]  # the world's
        self.nodes = Nodes(self.ledger, self.members.out)
        self.leading = SimLeading(self)
        self.agent: AgentServer | None = None
        self.edge_index = 0
        admission = Admission(self.ledger.read, SimReads(), self._resolve, _no_secrets)
        self.front = Front(self.ledger, admission, lambda: self.leading.links)
        self._supervisor = Obeyed(
            node.containers, node.folder, self._tell, self.clock.monotonic)
        self._supervisor.watched = node
        self.loop.create_task(self._live()).add_done_callback(self._ended)

    async def _live(self) -> None:
        self.replica.on_applied(self.ledger.woken)
        self.replica.on_leadership(self.leading.changed)
        containers = self.node.containers
        agent = Guarded(self.name, self._supervisor, containers, containers, self._the_beat,
                        lambda: self.replica.term, lambda: self.ledger.state.nodes,
                        kept=self.node.kept, confirm=self.replica.confirm_leader)
        async with asyncio.TaskGroup() as group:
            await self._supervisor.recover(group)
            self.agent = agent
            group.create_task(self._serve_edge())
            group.create_task(self.leading.run())
            group.create_task(self._until_out())

    async def _until_out(self) -> None:
        """As `Node` and `node_removal.until_out` have it; then the machine is the world's."""
        tasks = [asyncio.ensure_future(until_removed(self.ledger, self.name)),
                 asyncio.ensure_future(self._until_disowned())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await leave(self.ledger, self.replica.transfer, self.name)
        self.node.out = True

    async def _until_disowned(self) -> None:
        quiet_s = 0.0
        while True:
            await asyncio.sleep(ALONE_S)
            quiet_s += ALONE_S
            known = self.replica.leader is not None and self.name in self.ledger.state.nodes
            if known and quiet_s < ANYHOW_S:
                continue
            quiet_s = 0.0
            if await self._disowned():
                return

    async def _disowned(self) -> bool:
        """Ask the leader through its API, if it can be reached."""
        for other in self.world.present:
            there, cut = other.process, self.world.streams.cut
            ways = {(self.name, other.name), (other.name, self.name)}
            if there is None or other.frozen or not there.replica.is_leader or ways & cut:
                continue
            asking = there.loop.create_task(there.ledger.read())
            until_s = self.clock.monotonic() + ANSWER_S
            while not asking.done() and self.clock.monotonic() < until_s:
                await asyncio.sleep(0.05)
            if asking.done() and not asking.cancelled() and asking.exception() is None:
                state = asking.result()
                # Machines are founded by one alone; this world's founders come one after another.
                return bool(state.cluster) and self.name not in state.nodes
        return False

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self.world.fail(f"the process of {self.name} ended: {task.exception()!r}")

    def _tell(self, report: Report) -> None:
        if isinstance(report, AllocReport):
            self.world.note(f"{self.name} {report!r}")
        if self.agent is not None:
            self.agent.tell(report)

    def _the_beat(self) -> Beat:
        return Beat(at_ms=self.clock.wall_ms(), edge_index=self.edge_index,
                    log_error=self.replica.closed)

    async def _serve_edge(self) -> None:
        """The edge follows the state here, a little late; it outlives the process."""
        async for state in self.ledger.states():
            await asyncio.sleep(self.world.rng.choice(EDGE_S))
            self.node.edge = edge_table(state)
            self.edge_index = state.index
            if self.agent is not None:
                self.agent.beat_now()

    async def _resolve(self, image: str, _auth: str | None) -> str:
        await asyncio.sleep(self.world.rng.choice((0.01, 0.3)))
        if self.world.rng.random() < 0.05:
            raise PullFailed(image, "the registry does not answer", final=False)
        if tag_of(image) == GONE and self.world.rng.random() < 0.5:
            raise PullFailed(image, "there is no such tag", final=True)
        return digest_of(image)


def _no_secrets(_secret: Secret) -> str:
    raise MillError("nobody needs secrets here")
