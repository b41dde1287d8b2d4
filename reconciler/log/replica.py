"""The log as the rest of a node sees it: asyncio in front, the raft thread behind.

One thread owns everything of Raft. Commands and reads go in through queues that wake it;
results, the applied index and leadership come back through one `call_soon_threadsafe` for
all that happened in a tick. A failing disk closes the log of this node until it can be
written again (`closed`); if the thread raises anything else, this node is over (`fatal`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from reconciler.errors import MillError, Unprocessable
from reconciler.log.archive import NotHeld, Past
from reconciler.log.closure import Closure, closes
from reconciler.log.configuration import AddLearner, Change, Demote, Progress, Promote, Remove
from reconciler.log.disk import OsDisk
from reconciler.log.engine import Engine, News, OpenDisk, Status
from reconciler.log.errors import (
    ChangeUnderWay,
    CommandTooLarge,
    DiskFailed,
    LogBusy,
    LogClosed,
    LogDamaged,
    LogFailed,
    NobodyTakesOver,
    NoMajority,
    NotCaughtUp,
    NotLeader,
    OutcomeUnknown,
)
from reconciler.log.settings import Machine, Member, Membership, Settings, Timing
from reconciler.log.wire import MAX_COMMAND_BYTES

__all__ = [
    "AddLearner", "Change", "ChangeUnderWay", "CommandTooLarge", "Demote", "LogBusy", "LogClosed",
    "LogDamaged", "LogFailed", "Machine", "Member", "Membership", "NoMajority", "NobodyTakesOver",
    "NotCaughtUp", "NotHeld", "NotLeader", "OutcomeUnknown", "Past", "Progress", "Promote",
    "Remove", "Replica", "Settings", "Timing",
]  # fmt: skip

MAX_PROPOSALS = 4096  # under way at once; what is more would only wait
MAX_PROPOSED_BYTES = 64 << 20  # of them together, so that memory is bounded
MAX_READS = 16384  # under way at once
STOP_HANDOVER_S = 2.5  # a handover takes less; then this node stops all the same

_T = TypeVar("_T")


class Replica:
    """One node's copy of the log. All methods belong to the loop in which `start` ran."""

    fatal: asyncio.Future[None]

    def __init__(
        self, settings: Settings, machine: Machine, open_disk: OpenDisk = OsDisk
    ) -> None:
        self._settings, self._machine, self._open_disk = settings, machine, open_disk
        self._status = Status(Membership(settings.members))
        self._on_applied: list[Callable[[int], None]] = []
        self._on_leadership: list[Callable[[bool, int], None]] = []
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []
        self._on_closed: list[Callable[[str], None]] = []
        self._on_membership: list[Callable[[Membership], None]] = []
        self._engine: Engine | None = None
        self._closure: Closure | None = None
        self._reopening: asyncio.Task[None] | None = None
        self._stopping = False
        self._proposals, self._proposed_bytes, self._reads = 0, 0, 0

    @property
    def is_leader(self) -> bool:
        """Leads, with everything ever committed applied here. Another may lead already."""
        return self._status.leading

    @property
    def is_followed(self) -> bool:
        """Leads, and a majority has answered it within the time after which it would let go.

        Unlike `is_leader` it is false from the first instruction after a long pause on.
        """
        return self._engine is not None and self._engine.is_followed()

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
        """The highest index that the log has applied here; from the start again on opening."""
        return self._status.applied_index

    @property
    def closed(self) -> str:
        """Why a failing disk has closed this node's log, naming its folder; "" while it is open.

        Term, leader and the machine's state are then those of before.
        """
        return "" if self._closure is None else self._closure.reason

    @property
    def membership(self) -> Membership:
        """Who takes part, in effect at this node; perhaps not committed yet."""
        return self._status.membership

    def progress(self) -> Mapping[str, Progress]:
        """What this leader knows of each other member, by name; empty where it does not lead."""
        return {} if self._engine is None else self._engine.progress()

    def on_applied(self, callback: Callable[[int], None]) -> None:
        """Call `callback(applied_index)` in the loop after it moved; many steps are one call."""
        self._on_applied.append(callback)

    def on_leadership(self, callback: Callable[[bool, int], None]) -> None:
        """Call `callback(leading, term)` in the loop, each change in its order."""
        self._on_leadership.append(callback)

    def on_closed(self, callback: Callable[[str], None]) -> None:
        """Call `callback(closed)` in the loop when it changed; "" once the log is open again."""
        self._on_closed.append(callback)

    def on_membership(self, callback: Callable[[Membership], None]) -> None:
        """Call `callback(membership)` in the loop after it changed; it may change back."""
        self._on_membership.append(callback)

    def reload_identity(self) -> None:
        """Read the settings' certificate files again, for new connections; raises LogFailed."""
        if self._engine is not None:
            self._engine.reload_identity()

    async def start(self) -> None:
        """Open the folder and begin; raises LogDamaged (file and byte) or LogFailed.

        Where the disk cannot be written, the log begins closed.
        """
        assert self._engine is None, "a replica starts once"
        loop = asyncio.get_running_loop()
        self.fatal = loop.create_future()
        self.fatal.add_done_callback(_looked_at)
        try:
            self._run(await asyncio.to_thread(self._open, loop))
        except DiskFailed as error:
            self._close(error, loop)

    async def stop(self) -> None:
        """Hand leadership over where possible, then end the thread and close the files."""
        if self._stopping or (self._engine is None and self._closure is None):
            return
        self._stopping = True
        if self._engine is not None and self.is_leader:
            with contextlib.suppress(TimeoutError, MillError):
                async with asyncio.timeout(STOP_HANDOVER_S):
                    await self._hand_over(self._engine, None)
        if self._closure is not None:
            self._closure.end()
        if self._reopening is not None:
            await self._reopening
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop)
        for _, waiter in self._waiters:
            waiter.cancel()
        if not self.fatal.done():
            self.fatal.cancel()

    async def propose(self, command: bytes, timeout_s: float = 10.0) -> tuple[int, object]:
        """Write one command: its index and the machine's result, committed and applied here.

        Raises NotLeader, LogBusy, LogClosed, CommandTooLarge (nothing was written), or
        OutcomeUnknown.
        """
        engine = self._running()
        if len(command) > MAX_COMMAND_BYTES:
            raise CommandTooLarge(len(command), MAX_COMMAND_BYTES)
        if (
            self._proposals >= MAX_PROPOSALS
            or self._proposed_bytes + len(command) > MAX_PROPOSED_BYTES
        ):
            raise LogBusy(self._proposals)
        future: asyncio.Future[tuple[int, object]] = engine.loop.create_future()
        future.add_done_callback(_looked_at)

        def done(index: int, result: object, error: MillError | None) -> None:
            engine.tell(future, (index, result), error)

        self._proposals += 1
        self._proposed_bytes += len(command)
        try:
            engine.propose(command, done)
            return await _within(timeout_s, future)
        except TimeoutError as error:
            raise OutcomeUnknown(f"no commit within {timeout_s:g} s") from error
        finally:
            self._proposals -= 1
            self._proposed_bytes -= len(command)

    async def read_index(self, timeout_s: float = 5.0) -> int:
        """Wait until this leader's state is at least as new as this call; its index then.

        Raises NotLeader, LogClosed, or NoMajority when too few nodes answer in time.
        """
        engine = self._running()
        if self._reads >= MAX_READS:
            raise LogBusy(self._reads)
        future: asyncio.Future[int] = engine.loop.create_future()
        future.add_done_callback(_looked_at)

        def done(index: int, error: MillError | None) -> None:
            engine.tell(future, index, error)

        self._reads += 1
        try:
            engine.ask(done)
            return await _within(timeout_s, future)
        except TimeoutError as error:
            raise NoMajority(f"no confirmation within {timeout_s:g} s") from error
        finally:
            self._reads -= 1

    async def change(self, change: Change, timeout_s: float = 10.0) -> int:
        """Change who takes part, one change at a time: the index of the entry that does it.

        It is committed on return; where it is so already, nothing is written. A leader that is
        to be demoted or removed hands its leadership over first, and then raises NotLeader: the
        new one is to be asked. Raises NotLeader, ChangeUnderWay, NotCaughtUp, NobodyTakesOver,
        NotFound, Conflict, Unprocessable (nothing was written), or OutcomeUnknown.
        """
        engine = self._running()
        if isinstance(change, Demote | Remove) and change.name == self._settings.me.name:
            if self.is_leader:
                await self.transfer()
            raise NotLeader(self._other_leader)
        future: asyncio.Future[int] = engine.loop.create_future()
        future.add_done_callback(_looked_at)

        def done(index: int, _result: object, error: MillError | None) -> None:
            engine.tell(future, index, error)

        try:
            engine.change(change, done)
            return await _within(timeout_s, future)
        except TimeoutError as error:
            raise OutcomeUnknown(f"no commit within {timeout_s:g} s") from error

    async def transfer(self, to: str | None = None) -> None:
        """Hand leadership to voter `to`, or to the one that has the most, and go on following.

        What is proposed here meanwhile waits, and then raises NotLeader: it was not written.
        Raises NotLeader, ChangeUnderWay, or NobodyTakesOver: then this node leads on.
        """
        await self._hand_over(self._running(), to)

    async def _hand_over(self, engine: Engine, to: str | None) -> None:
        future: asyncio.Future[None] = engine.loop.create_future()
        future.add_done_callback(_looked_at)

        def done(error: MillError | None) -> None:
            engine.tell(future, None, error)

        if to == self._settings.me.name:
            return
        engine.hand_over(to, done)
        await future

    @property
    def _other_leader(self) -> str | None:
        return None if self.leader == self._settings.me.name else self.leader

    async def confirm_leader(self, timeout_s: float = 5.0) -> int:
        """The term in which this node is, right now, the one leader; raises like `read_index`."""
        await self.read_index(timeout_s)
        return self.term

    async def wait_applied(self, index: int, timeout_s: float) -> None:
        """Return once `index` is applied here; raises NoMajority after `timeout_s`."""
        if self._stopping:
            raise NotLeader
        if self.applied_index >= index:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((index, waiter))
        try:
            await _within(timeout_s, waiter)
        except TimeoutError as error:
            raise NoMajority(
                f"entry {index} is not here after {timeout_s:g} s; at {self.applied_index}"
            ) from error
        finally:
            self._waiters = [each for each in self._waiters if each[1] is not waiter]

    async def history(self, index: int) -> Past:
        """What led to the state at `index`: a snapshot's state and the commands since.

        Read in a thread of its own from files and memory of this node. Raises NotHeld (with the
        oldest index there is) or Unprocessable for one that is not applied here.
        """
        engine = self._running()
        if not 0 < index <= self.applied_index:
            raise Unprocessable(f"index {index} is not there yet; at {self.applied_index}",
                                hint="ask for an earlier one, or wait")
        return await asyncio.to_thread(engine.past, index)

    def _running(self) -> Engine:
        if self._stopping:
            raise NotLeader
        if self._closure is not None:
            raise LogClosed(self._closure.reason)
        if self._engine is None:
            raise NotLeader
        if self.fatal.done():
            raise LogFailed("this node's log has stopped", hint="look at the agent's own log")
        return self._engine

    def _open(self, loop: asyncio.AbstractEventLoop) -> Engine:
        return Engine(self._settings, self._machine, loop, self._deliver, self._open_disk)

    def _run(self, engine: Engine) -> None:
        self._engine, self._closure = engine, None
        self._take_status(engine.status())
        engine.start()

    def _close(self, error: MillError, loop: asyncio.AbstractEventLoop) -> None:
        """Let go of the engine that failed, and open another as soon as the disk allows it."""
        former, self._engine = self._engine, None
        if self.leader == self._settings.me.name:
            self._status = dataclasses.replace(self._status, leader=None)
        closure = self._closure = Closure(
            str(self._settings.folder), error, self._settings.timing.reopen_s,
            lambda: self._open(loop),
        )  # fmt: skip
        self._reopening = loop.create_task(self._reopen(closure, former))
        self._tell_closed(closure.reason)

    async def _reopen(self, closure: Closure, former: Engine | None) -> None:
        try:
            engine = await closure.wait(former, self._tell_closed)
        except Exception as error:  # a mistake of ours: as one in the raft thread
            if not self.fatal.done():
                self.fatal.set_exception(error)
            raise
        if engine is not None:
            self._run(engine)
            self._tell_closed("")

    def _tell_closed(self, reason: str) -> None:
        for on_closed in tuple(self._on_closed):
            on_closed(reason)

    def _take_status(self, status: Status) -> None:
        former, self._status = self._status, status
        if status.membership != former.membership:
            for on_membership in tuple(self._on_membership):
                on_membership(status.membership)

    def _deliver(self, news: News) -> None:
        """In the loop: all that one or more ticks brought, in the order that callers rely on."""
        moved = news.status.applied_index != self._status.applied_index
        self._take_status(news.status)
        for answer in news.answers:
            answer()
        for leading, term in news.leadership:
            for on_leadership in tuple(self._on_leadership):
                on_leadership(leading, term)
        if moved:
            for index, waiter in self._waiters:
                if index <= self.applied_index and not waiter.done():
                    waiter.set_result(None)
            for on_applied in tuple(self._on_applied):
                on_applied(self.applied_index)
        if news.fatal is None or self.fatal.done():
            return
        if isinstance(news.fatal, MillError) and closes(news.fatal) and not self._stopping:
            self._close(news.fatal, asyncio.get_running_loop())
        else:
            self.fatal.set_exception(news.fatal)


async def _within(timeout_s: float, future: asyncio.Future[_T]) -> _T:
    """Not `asyncio.wait_for`: before Python 3.12 it drops a cancellation that comes together with
    the answer, and a loop of a deposed leader would go on for ever."""
    async with asyncio.timeout(timeout_s):
        return await future


def _looked_at(future: asyncio.Future[Any]) -> None:
    """Nobody has to await it: not looking at it must not be an error of its own."""
    if not future.cancelled():
        future.exception()
