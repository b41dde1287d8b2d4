"""The log as everybody else sees it: the state here and now, and one way to change it.

It joins the replica (bytes, indexes) with the state machine (commands, states), so that leader
loops, API and edges speak of neither.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import structlog

from reconciler.clock import Clock
from reconciler.errors import MillError
from reconciler.fsm.apply import Refused, Repeated, apply
from reconciler.fsm.codec import Entry, Undecodable, decode_entry, decode_state, encode_entry
from reconciler.fsm.codec import encode_state as encode_state_bytes
from reconciler.fsm.commands import AnyCommand
from reconciler.fsm.state import State

log = structlog.get_logger("mill.ledger")


class Replica(Protocol):
    """What the ledger needs of `reconciler.log.replica.Replica`."""

    @property
    def is_leader(self) -> bool:
        """This node leads, and its term's first entry is applied."""
        ...

    @property
    def term(self) -> int:
        """The current term."""
        ...

    @property
    def leader(self) -> str | None:
        """The leader's node name, where known."""
        ...

    async def propose(self, command: bytes, timeout_s: float = 10.0) -> tuple[int, object]:
        """Commit and apply; raises NotLeader or OutcomeUnknown."""
        ...

    async def read_index(self, timeout_s: float = 5.0) -> int:
        """A linearizable barrier."""
        ...


class CommandRefused(MillError):
    """The state no longer holds what the command assumed; nothing changed."""

    status = 409

    def __init__(self, refusal: Refused) -> None:
        super().__init__(refusal.reason, hint=refusal.hint)
        self.refusal = refusal


_noted: ContextVar[list[AnyCommand] | None] = ContextVar("noted", default=None)


@contextmanager
def noting() -> Iterator[list[AnyCommand]]:
    """The commands that this task and those it starts have written, or may have."""
    written: list[AnyCommand] = []
    before = _noted.set(written)
    try:
        yield written
    finally:
        _noted.reset(before)


class StateMachine:
    """The replica's `Machine`: holds the newest state; called in the log's thread alone.

    `state` never goes back: while a log that opened again replays its entries, the state from
    before stays, so that nobody routes to what has long stopped.
    """

    def __init__(self) -> None:
        self.state = State()
        self._replayed: State | None = None  # while it is behind `state`

    def apply(self, index: int, command: bytes) -> object:
        """Total: whatever the bytes, the next state is defined."""
        try:
            entry = decode_entry(command)
        except Undecodable as error:
            log.error("entry_refused", index=index, reason=error.what)
            return Refused(error.what, error.hint)
        state, result = apply(self._newest, index, entry)
        self._take(state)
        return result

    def dump(self) -> bytes:
        """A snapshot of the newest state."""
        return encode_state_bytes(self._newest)

    def load(self, snapshot: bytes) -> None:
        """Take up a snapshot."""
        self._take(decode_state(snapshot))

    def reset(self) -> None:
        """Begin anew, out of sight."""
        self._replayed = State()

    @property
    def _newest(self) -> State:
        return self.state if self._replayed is None else self._replayed

    def _take(self, state: State) -> None:
        if state.index >= self.state.index:
            self.state, self._replayed = state, None
        else:
            self._replayed = state


class Ledger:
    """One node's view of the log. `state` is immutable: hold it as long as you like."""

    def __init__(self, replica: Replica, machine: StateMachine, clock: Clock) -> None:
        self._replica = replica
        self._machine = machine
        self._clock = clock
        self._moved = asyncio.Event()

    @property
    def state(self) -> State:
        """The newest state that is applied here; a follower's may be a moment old."""
        return self._machine.state

    @property
    def is_leader(self) -> bool:
        """This node leads."""
        return self._replica.is_leader

    @property
    def term(self) -> int:
        """The current term."""
        return self._replica.term

    @property
    def leader(self) -> str | None:
        """The leader's node name, where known."""
        return self._replica.leader

    @property
    def clock(self) -> Clock:
        """The clock that stamps commands."""
        return self._clock

    async def propose(self, command: AnyCommand, timeout_s: float = 10.0) -> int:
        """Commit one command; its index, or that of the entry that carried out the same request
        before. Leader only.

        Raises CommandRefused (nothing changed), NotLeader (it did not happen), OutcomeUnknown.
        """
        entry = encode_entry(Entry(self._clock.wall_ms(), command))
        noted = _noted.get()
        try:
            index, result = await self._replica.propose(entry, timeout_s)
        except BaseException as error:
            if noted is not None and not (isinstance(error, MillError) and error.unwritten):
                noted.append(command)
            raise
        if isinstance(result, Refused):
            raise CommandRefused(result)
        if noted is not None:
            noted.append(command)
        return result.index if isinstance(result, Repeated) else index

    async def read(self) -> State:
        """A linearizable read: at least as new as every write acknowledged before the call."""
        await self._replica.read_index()
        return self.state

    def woken(self, _index: int) -> None:
        """Called in the loop when the applied index moved or a snapshot came in."""
        self._moved.set()
        self._moved = asyncio.Event()

    async def changed(self, seen: State) -> State:
        """Wait until the state is another than `seen`; the newest one."""
        while True:
            moved = self._moved
            if self.state is not seen:
                return self.state
            await moved.wait()

    async def until(self, holds: Callable[[State], bool]) -> State:
        """Wait until a state `holds`; no deadline of its own, so give it one."""
        state = self.state
        while not holds(state):
            state = await self.changed(state)
        return state

    async def states(self) -> AsyncIterator[State]:
        """The newest state, and again after each change; slow readers skip to the newest."""
        state = self.state
        while True:
            yield state
            state = await self.changed(state)
