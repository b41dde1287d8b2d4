"""Who takes part in the log follows who is in the state, one change at a time.

`next_change` is a pure look at both, so a leader that dies anywhere is followed by one that goes
on. Whoever is new follows first (a learner); the voters are the largest of 1, 3, 5 that there are
nodes for; one that drains or stays down is exchanged where another has caught up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, assert_never

import structlog

from reconciler.errors import MillError
from reconciler.executor.ledger import Ledger
from reconciler.fsm.records import Node
from reconciler.fsm.state import State

log = structlog.get_logger("mill.membership")

VOTERS = (5, 3, 1)
"""More than five would only make every write wait for more disks."""
DOWN_MS = 60_000
"""A voter that is down for so long is exchanged; a restart takes less."""
CAUGHT_UP_ENTRIES = 256
"""A learner that lacks no more has them within one message."""
HEARD_S = 1.0
"""A member that has not answered for so long may be dead (as the log's leader sees it)."""
LOOK_S = 1.0


class Member(Protocol):
    """One node of the log, and where its log listens."""

    @property
    def name(self) -> str:
        """Its node's name."""
        ...

    @property
    def host(self) -> str:
        """An IP address or name."""
        ...

    @property
    def port(self) -> int:
        """TCP."""
        ...


class Members(Protocol):
    """Who takes part in the log."""

    @property
    def voters(self) -> Sequence[Member]:
        """They elect and acknowledge."""
        ...

    @property
    def learners(self) -> Sequence[Member]:
        """They only follow."""
        ...


class Progress(Protocol):
    """What the leader knows of another member: the index that it holds, seconds since it last
    answered, whether there is a connection."""

    @property
    def matched(self) -> int:
        """0 until it first answers."""
        ...

    @property
    def heard_s(self) -> float:
        """Since its last answer."""
        ...

    @property
    def connected(self) -> bool:
        """Right now."""
        ...


@dataclass(frozen=True)
class AddLearner:
    """Let it follow; one that takes part already is only found at this address from now on."""

    name: str
    host: str
    port: int


@dataclass(frozen=True)
class Promote:
    """Make a learner a voter."""

    name: str


@dataclass(frozen=True)
class Demote:
    """Make a voter a learner."""

    name: str


@dataclass(frozen=True)
class Remove:
    """Let a learner take part no more."""

    name: str


@dataclass(frozen=True)
class Handover:
    """This leader is to vote no more: `to` leads, and sees to it."""

    to: str


Change = AddLearner | Promote | Demote | Remove
Step = Change | Handover


class Log(Protocol):
    """What the loop needs of the log on its leader; all of it may raise MillError."""

    @property
    def membership(self) -> Members:
        """In effect here."""
        ...

    def progress(self) -> Mapping[str, Progress]:
        """Of each other member; empty where this node does not lead."""
        ...

    async def change(self, change: Change) -> object:
        """Committed on return."""
        ...

    async def transfer(self, to: str | None = None) -> None:
        """Hand leadership over."""
        ...


def wanted_voters(nodes: int) -> int:
    """The largest of 1, 3, 5 not above the number of nodes."""
    return next((count for count in VOTERS if count <= nodes), 1)


def next_change(
    state: State, members: Members, progress: Mapping[str, Progress], me: str, now_ms: int,
) -> Step | None:
    """What the leader `me` does next, or None where all is as it should be, or must wait.

    Learners come and go first, since they decide nothing; then one voter at a time. Nobody is gone
    before the cluster is founded: its nodes come into the state one after the other.
    """
    known = {m.name for m in (*members.voters, *members.learners)}
    gone = frozenset(known - state.nodes.keys() if state.cluster else ())
    view = _View(state, members, progress, me, now_ms, gone)
    return _learners(view) or _voters(view)


@dataclass(frozen=True)
class _View:
    state: State
    members: Members
    progress: Mapping[str, Progress]
    me: str
    now_ms: int
    gone: frozenset[str]

    @property
    def voters(self) -> frozenset[str]:
        return frozenset(member.name for member in self.members.voters)

    def answers(self, name: str) -> bool:
        known = self.progress.get(name)
        return name == self.me or (
            known is not None and known.connected and known.heard_s < HEARD_S)

    def caught_up(self, name: str) -> bool:
        known = self.progress.get(name)
        return known is not None and self.answers(name) and known.matched > 0 \
            and known.matched + CAUGHT_UP_ENTRIES >= self.state.index

    def fitness(self, name: str) -> int:
        """3 as it should be, 2 leaving, 1 down for long, 0 gone. A leader is not down."""
        node = self.state.nodes.get(name)
        if name in self.gone:
            return 0
        if node is None:
            return 3
        if node.status == "down" and name != self.me \
                and self.now_ms - node.since_ms > DOWN_MS:
            return 1
        return 2 if node.draining else 3

    def worth(self, name: str) -> tuple[int, bool, bool, bool]:
        """Greater for who should rather vote: the fit, then who does already."""
        return (self.fitness(name), name in self.voters, name == self.me, self.answers(name))

    def best_first(self, names: Collection[str]) -> list[str]:
        return sorted(sorted(names), key=self.worth, reverse=True)


def _learners(view: _View) -> Step | None:
    known = {m.name: m for m in (*view.members.voters, *view.members.learners)}
    for node in sorted(view.state.nodes.values(), key=lambda n: n.number):
        address = _address(node)
        if address is None:
            continue
        member = known.get(node.name)
        if member is None or (member.host, member.port) != address:
            return AddLearner(node.name, *address)
    for member in sorted(view.members.learners, key=lambda m: m.name):
        if member.name in view.gone:
            return Remove(member.name)
    return None


def _address(node: Node) -> tuple[str, int] | None:
    """Where its log listens; None for one that takes no part in it."""
    host, _, port = node.log.rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdecimal() else None


def _voters(view: _View) -> Step | None:
    """One step to the voters that there should be. Whoever does not answer goes before another
    comes: fewer are needed for a majority then; else another comes first."""
    target = _target(view)
    drop = view.best_first(view.voters - target)
    heirs = [name for name in view.best_first(view.voters & target) if view.caught_up(name)]
    silent = [name for name in drop if not view.answers(name)]
    if silent and view.me in view.gone and heirs:
        return Handover(heirs[0])
    if silent:
        return _demote(view, silent[-1])
    add = view.best_first(target - view.voters)
    if add:
        return Promote(add[0])
    others = [name for name in drop if name != view.me]
    if others:
        step = _demote(view, others[-1])
        if step is not None or view.me not in view.gone:
            return step
    return Handover(heirs[0]) if drop and heirs else None


def _demote(view: _View, name: str) -> Step | None:
    """Never below a majority that answers. One that was removed answers only until it has learnt
    so: who stays does not lose its vote on such a word, for nobody could undo what waits for it."""
    left = view.voters - {name}
    counted = left if name in view.gone else left - view.gone
    return Demote(name) if 2 * sum(map(view.answers, counted)) > len(left) else None


def _target(view: _View) -> frozenset[str]:
    """Who should vote, of those that can now.

    An even number is no safer than one less, and needs one more for a majority: voters come in
    twos. But where one of two has come already, or one has gone, nobody goes for that.
    """
    here = {m.name for m in (*view.members.voters, *view.members.learners)} - view.gone
    wanted = wanted_voters(len(here))
    learners = [
        name for name in here - view.voters
        if view.caught_up(name) and view.fitness(name) >= 2 and _is_up(view, name)
    ]
    best = view.best_first([*(view.voters - view.gone), *learners])[:wanted]
    chosen = frozenset(best)
    new = [name for name in best if name not in view.voters]
    if new and len(chosen) % 2 == 0 and len(chosen) > len(view.voters):
        return chosen - {new[-1]}
    return chosen


def _is_up(view: _View, name: str) -> bool:
    node = view.state.nodes.get(name)
    return node is not None and node.status != "down"


@dataclass
class Membership:
    """The leader's loop that makes the log's members those of the state. `me`: this node."""

    ledger: Ledger
    log: Log
    me: str

    async def run(self, _term: int = 0) -> None:
        """Until cancelled."""
        while True:
            seen = self.ledger.state.nodes
            if await self._step():
                continue
            try:
                async with asyncio.timeout(LOOK_S):
                    await self.ledger.until(lambda s, seen=seen: s.nodes is not seen)  # type: ignore[misc]  # mypy does not infer a lambda's default
            except TimeoutError:
                pass

    async def _step(self) -> bool:
        """Make the next change; False where there is none now, or it was refused."""
        step = next_change(self.ledger.state, self.log.membership, self.log.progress(), self.me,
                           self.ledger.clock.wall_ms())
        if step is None:
            return False
        try:
            await self._take(step)
        except MillError as error:
            log.info("members_wait", step=type(step).__name__, reason=error.what)
            return False
        return True

    async def _take(self, step: Step) -> None:
        match step:
            case Handover():
                log.info("handing_over", to=step.to)
                await self.log.transfer(step.to)
            case AddLearner() | Promote() | Demote() | Remove():
                await self.log.change(step)
                log.info("members_changed", change=type(step).__name__, node=step.name)
            case _:
                assert_never(step)
