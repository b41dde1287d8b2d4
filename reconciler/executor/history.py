"""The state as it was: what led to an index is read from the log and applied anew."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from reconciler.executor.ledger import StateMachine
from reconciler.fsm.state import State

MAX_STATES = 4
"""Kept for whoever asks for the same index again: a page, or a diff of two."""


class Past(Protocol):
    """What `reconciler.log.replica.Past` says."""

    @property
    def base(self) -> bytes | None:
        """A snapshot; None is the empty state."""
        ...

    @property
    def commands(self) -> Sequence[tuple[int, bytes]]:
        """What came after it, with its indexes."""
        ...


class Replica(Protocol):
    """What is needed of `reconciler.log.replica.Replica`."""

    async def history(self, index: int) -> Past:
        """What led to an applied index; raises NotHeld (404) with the oldest index there is."""
        ...


class History:
    """States of the past. One is rebuilt at a time, so that memory and processor are bounded."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._lock = asyncio.Lock()
        self._states: OrderedDict[int, State] = OrderedDict()

    async def at(self, index: int) -> State:
        """The state after the entry `index`; NotHeld (404) or Unprocessable (422)."""
        async with self._lock:
            state = self._states.get(index)
            if state is None:
                past = await self._replica.history(index)
                state = await asyncio.to_thread(replayed, past)
            self._states[index] = state
            self._states.move_to_end(index)
            while len(self._states) > MAX_STATES:
                self._states.popitem(last=False)
            return state


def replayed(past: Past) -> State:
    """The state that these commands lead to."""
    machine = StateMachine()
    if past.base is not None:
        machine.load(past.base)
    for index, command in past.commands:
        machine.apply(index, command)
    return machine.state
