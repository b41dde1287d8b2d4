"""The log as one simulated process sees it: the interface of `reconciler.log.replica.Replica`.

The world ticks the real Raft; what a tick brings reaches the loop as one piece of news, status
before answers before leadership before the applied index, as the real one delivers it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from reconciler.errors import MillError
from reconciler.log.configuration import Change, Demote, Progress, Remove
from reconciler.log.errors import LogClosed, NoMajority, NotLeader, OutcomeUnknown
from reconciler.log.hardening import Raft
from reconciler.log.settings import Membership
from tests.sim.whole.loop import SimLoop

T = TypeVar("T")

if TYPE_CHECKING:
    from tests.sim.whole.world import WholeNode


@dataclass(frozen=True)
class Status:
    """What the log last said of itself."""

    membership: Membership
    leading: bool = False
    leader: str | None = None
    term: int = 0
    applied_index: int = 0


@dataclass(frozen=True)
class News:
    """What one tick brought."""

    status: Status
    answers: list[Callable[[], None]]
    leadership: list[tuple[bool, int]]


class SimReplica:
    """One process's way to its node's Raft."""

    def __init__(self, node: WholeNode, loop: SimLoop) -> None:
        self._node, self._loop = node, loop
        self._status = self._told = Status(Membership(node.founding))
        self._leading = False
        self._answers: list[Callable[[], None]] = []
        self._leadership: list[tuple[bool, int]] = []
        self._on_applied: list[Callable[[int], None]] = []
        self._on_leadership: list[Callable[[bool, int], None]] = []
        self.closed = ""

    @property
    def is_leader(self) -> bool:
        """Leads, with everything ever committed applied here."""
        return self._status.leading

    @property
    def is_followed(self) -> bool:
        """Leads, and a majority has answered it just now."""
        raft = self._node.raft
        return raft is not None and raft.members.is_followed()

    async def confirm_leader(self, timeout_s: float = 5.0) -> int:
        """The term in which this node is, right now, the one leader."""
        await self.read_index(timeout_s)
        return self.term

    @property
    def leader(self) -> str | None:
        """The last known leader's name."""
        return self._status.leader

    @property
    def term(self) -> int:
        """The current term."""
        return self._status.term

    @property
    def applied_index(self) -> int:
        """The highest index that is applied here."""
        return self._status.applied_index

    @property
    def membership(self) -> Membership:
        """Who takes part, in effect at this node."""
        return self._status.membership

    def progress(self) -> Mapping[str, Progress]:
        """What this leader knows of each other member; empty where it does not lead."""
        return {} if self._node.raft is None else self._node.raft.members.progress()

    def on_applied(self, callback: Callable[[int], None]) -> None:
        """Call it in the loop after the index moved."""
        self._on_applied.append(callback)

    def on_leadership(self, callback: Callable[[bool, int], None]) -> None:
        """Call it in the loop at each change."""
        self._on_leadership.append(callback)

    async def propose(self, command: bytes, timeout_s: float = 10.0) -> tuple[int, object]:
        """Write one command: its index and the machine's result."""
        raft = self._raft()
        future: asyncio.Future[tuple[int, object]] = self._loop.create_future()
        invariants = self._node.world.invariants
        invariants.proposed(command)

        def done(index: int, result: object, error: MillError | None) -> None:
            if error is None:
                invariants.acknowledged(self._node.name, raft.term, index, command)
            self._answers.append(lambda: _settle(future, (index, result), error))

        raft.propose(command, done)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError as error:
            raise OutcomeUnknown(f"no commit within {timeout_s:g} s") from error

    async def read_index(self, timeout_s: float = 5.0) -> int:
        """Wait until the state here is at least as new as this call."""
        raft = self._raft()
        future: asyncio.Future[int] = self._loop.create_future()
        invariants = self._node.world.invariants
        asked_at = invariants.highest_acked

        def done(index: int, error: MillError | None) -> None:
            if error is None:
                invariants.read(self._node.name, asked_at, index)
            self._answers.append(lambda: _settle(future, index, error))

        raft.reads.ask(done)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError as error:
            raise NoMajority(f"no confirmation within {timeout_s:g} s") from error

    async def change(self, change: Change, timeout_s: float = 10.0) -> int:
        """Change who takes part: the index of the entry that does it, committed on return."""
        raft = self._raft()
        if isinstance(change, Demote | Remove) and change.name == self._node.name:
            if self.is_leader:
                await self.transfer()
            raise NotLeader(None if self.leader == self._node.name else self.leader)
        future: asyncio.Future[int] = self._loop.create_future()

        def done(index: int, _result: object, error: MillError | None) -> None:
            self._node.world.changes += error is None
            self._answers.append(lambda: _settle(future, index, error))

        raft.members.ask(change, done)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError as error:
            raise OutcomeUnknown(f"no commit within {timeout_s:g} s") from error

    async def transfer(self, to: str | None = None) -> None:
        """Hand leadership to voter `to`, or to the one that has the most, and go on following."""
        raft = self._raft()
        future: asyncio.Future[None] = self._loop.create_future()

        def done(error: MillError | None) -> None:
            self._node.world.handovers += error is None
            self._answers.append(lambda: _settle(future, None, error))

        if to == self._node.name:
            return
        raft.hand_over(to, done)
        await future

    @property
    def announced(self) -> bool:
        """The log has said that it leads, and not yet that it ceased to."""
        return self._leading

    # What the node's log tells, between two pumps of the loop.

    def opened(self, raft: Raft) -> None:
        """A log is open, again or for the first time."""
        self.closed = ""
        self._status = Status(
            raft.members.latest, False, raft.leader, raft.term, raft.applied_index)

    def shut(self, why: str) -> None:
        """A failing disk has closed it."""
        self.closed = why

    def led(self, leading: bool, term: int) -> None:
        """Keep each change, in order."""
        self._leading = leading
        self._leadership.append((leading, term))

    def flush(self, raft: Raft) -> None:
        """Hand over what happened since the last call."""
        status = Status(
            raft.members.latest, self._leading, raft.leader, raft.term, raft.applied_index)
        if status == self._told and not self._answers and not self._leadership:
            return
        self._told = status
        news = News(status, self._answers, self._leadership)
        self._answers, self._leadership = [], []
        self._loop.call_soon(self._deliver, news)

    def _deliver(self, news: News) -> None:
        moved = news.status.applied_index != self._status.applied_index
        self._status = news.status
        for answer in news.answers:
            answer()
        for leading, term in news.leadership:
            for on_leadership in self._on_leadership:
                on_leadership(leading, term)
        if moved:
            for on_applied in self._on_applied:
                on_applied(self.applied_index)

    def _raft(self) -> Raft:
        if self.closed:
            raise LogClosed(self.closed)
        if self._node.raft is None:
            raise NotLeader
        return self._node.raft


def _settle(future: asyncio.Future[T], value: T, error: MillError | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
        future.exception()  # nobody has to await it
    else:
        future.set_result(value)
