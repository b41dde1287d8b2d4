"""Nodes as a person handles them: drained, taken back, removed. What a drain's stream tells is read
from the state, so any node can tell it, also one that led when it began.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from reconciler.errors import NotFound
from reconciler.executor.ledger import CommandRefused, Ledger
from reconciler.executor.moves import draining, in_deploy, overdue, pairs, room_for, stranded
from reconciler.executor.requests import DrainStep
from reconciler.fsm import commands as c
from reconciler.fsm.records import ENDED
from reconciler.fsm.state import State

LOOK_S = 0.5
"""What is short is looked at again so often, whether the state moved or not."""
LEADER_S = 10.0
"""How long an empty node that still leads is waited for, before that is said."""
OUT_S = 10.0
"""How long a removal waits for the log's members to follow it; they follow anyway."""


async def _at_once(_name: str) -> None:
    """There are no members to wait for."""


@dataclass(frozen=True)
class Nodes:
    """Takes nodes out of service and back into it. `out` returns once the log's members, as this
    node knows them, are without that name."""

    ledger: Ledger
    out: Callable[[str], Awaitable[None]] = _at_once

    async def drain(self, name: str, timeout_ms: int) -> AsyncIterator[DrainStep]:
        """Drain it, and tell how that goes until `done` or `failed`. One that drains already is
        followed. NotFound, before the first step. The drain goes on whoever listens."""
        state = self._known(name)
        if not state.nodes[name].draining:
            try:
                await self.ledger.propose(c.DrainNode(name))
            except CommandRefused:
                if not self._known(name).nodes[name].draining:
                    raise  # else another drain of the same node was first
        telling = _Telling(self.ledger, name, timeout_ms / 1000)
        async for step in telling.steps():
            yield step

    async def undrain(self, name: str) -> None:
        """It takes allocations again. NotFound; CommandRefused where it was not draining."""
        self._known(name)
        await self.ledger.propose(c.UndrainNode(name))

    async def remove(self, name: str) -> None:
        """Out of the state, and then of the log's members. NotFound; CommandRefused while it has
        allocations, or is the last."""
        self._known(name)
        await self.ledger.propose(c.RemoveNode(name))
        try:
            async with asyncio.timeout(OUT_S):
                await self.out(name)
        except TimeoutError:
            return  # the state says that it is gone, and the leader sees to the members

    def _known(self, name: str) -> State:
        state = self.ledger.state
        if name not in state.nodes:
            raise NotFound(f"no node {name}", hint="list them with: mill nodes")
        return state


@dataclass
class _Telling:
    """One stream: what was told already, so that each thing is told once."""

    ledger: Ledger
    name: str
    timeout_s: float
    _began: float = 0.0
    _left: dict[str, str] = field(default_factory=dict)  # allocation → its service
    _to: dict[str, str] = field(default_factory=dict)  # allocation → its replacement's node
    _warned: set[str] = field(default_factory=set)
    _led: bool = False

    async def steps(self) -> AsyncIterator[DrainStep]:
        self._began = self._now()
        state = self.ledger.state
        self._left = self._there(state)
        self._led = self.ledger.leader == self.name
        yield DrainStep(phase="draining", node=self.name, left=len(self._left))
        while True:
            for step in self._news(state):
                yield step
            end = self._end(state)
            if end is not None:
                yield end
                return
            state = await self._next(state)

    async def _next(self, seen: State) -> State:
        left_s = self.timeout_s - (self._now() - self._began)
        try:
            async with asyncio.timeout(max(0.0, min(LOOK_S, left_s))):
                return await self.ledger.changed(seen)
        except TimeoutError:
            return self.ledger.state

    def _news(self, state: State) -> Iterator[DrainStep]:
        leader = self.ledger.leader
        if self._led and leader not in (None, self.name):
            self._led = False
            yield DrainStep(phase="leader", node=leader or "")
        there = self._there(state)
        started = [a for a in state.allocations.values()
                   if a.replaces in self._left and a.live and a.node != self.name
                   and self._to.get(a.replaces) != a.node]
        for new in sorted(started, key=lambda a: a.id):
            self._to[new.replaces] = new.node
            yield DrainStep(phase="moving", service=new.service, alloc=new.replaces,
                            node=new.node)
        self._left |= {key: there[key] for key in there.keys() - self._left.keys()}
        for alloc in sorted(self._left.keys() - there.keys()):
            yield DrainStep(phase="moved", service=self._left[alloc], alloc=alloc,
                            node=self._to.get(alloc, ""), left=len(there))
        self._left = there
        for text in self._warnings(state):
            if text not in self._warned:
                self._warned.add(text)
                yield DrainStep(phase="warning", reason=text)

    def _warnings(self, state: State) -> Iterator[str]:
        """What holds the drain up right now."""
        node = state.nodes.get(self.name)
        if node is not None and node.status == "down":
            yield f"{self.name} is down: what ran there is started elsewhere"
        deploy = state.running_deploy()
        busy = in_deploy(state) & set(self._left.values())
        if deploy is not None and busy:
            yield f"{', '.join(sorted(busy))}: moves once {deploy.id} has ended"
        for alloc in stranded(state):
            if alloc.node == self.name and not isinstance(short := room_for(state, alloc), str):
                lacks = short.text.partition(": ")[2]
                yield f"{alloc.service}: no other node has room for {alloc.id}: {lacks}"
        now_ms = self.ledger.clock.wall_ms()
        for pair in pairs(state):
            if pair.goes.node == self.name and overdue(state, pair, now_ms):
                why = f": {pair.stays.reason}" if pair.stays.reason else ""
                yield (f"{pair.stays.service}: {pair.stays.id} on {pair.stays.node}, which takes "
                       f"the place of {pair.goes.id}, is not healthy{why}")
        if self._leads_on(state) and self._now() - self._began >= LEADER_S:
            yield f"{self.name} still leads: no other node can take that over now"

    def _end(self, state: State) -> DrainStep | None:
        elapsed = self._now() - self._began
        left = len(self._left)
        waits = self._leads_on(state) and elapsed < LEADER_S
        if left == 0 and not waits:
            return DrainStep(phase="done", node=self.name, left=0, elapsed=elapsed)
        if self.name not in draining(state):
            return DrainStep(phase="failed", node=self.name, left=left, elapsed=elapsed,
                             reason=f"the drain of {self.name} was called off")
        if elapsed >= self.timeout_s:
            return DrainStep(
                phase="failed", node=self.name, left=left, elapsed=elapsed,
                reason=f"{left} allocations are still there after {self.timeout_s:g} s; "
                       f"{self.name} stays draining until: mill undrain {self.name}")
        return None

    def _leads_on(self, state: State) -> bool:
        """It leads, though another could."""
        return self.ledger.leader == self.name and any(
            node.status == "ready" and not node.draining for node in state.nodes.values())

    def _there(self, state: State) -> dict[str, str]:
        return {a.id: a.service for a in state.allocations.values()
                if a.node == self.name and a.status not in ENDED}

    def _now(self) -> float:
        return self.ledger.clock.monotonic()
