"""Draining a node: what lives on it moves elsewhere, one allocation of a service at a time, and
leaves the routes only after its replacement has come into them.

The leader's loop decides from the state alone, so that the next leader goes on where one stopped;
`drains.py` is what a person sees of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog

from reconciler.errors import Conflict, MillError
from reconciler.executor.ledger import CommandRefused, Ledger
from reconciler.executor.links import Links
from reconciler.executor.moves import (
    Pair,
    draining,
    in_deploy,
    may_go,
    pairs,
    room_for,
    stranded,
)
from reconciler.fsm import commands as c
from reconciler.fsm.records import Allocation
from reconciler.fsm.state import State

log = structlog.get_logger("mill.drain")

Transfer = Callable[[str], Awaitable[None]]
"""Hands leadership to that node; Conflict where it cannot take it."""

MOVES = 4
"""Moves under way at once, each of another service: pulls and starts share disks and links."""
ROUTED_S = 5.0
"""An edge that has not confirmed a replacement for so long is waited for no more (contracts)."""
ROOM_AGAIN_S = 1.0
"""How often room is looked for again where there was none."""
LOOK_S = 0.5
HAND_OVER_AGAIN_S = 1.0
HAND_OVER_TRIES = 5
"""So often leadership is offered before the node is emptied all the same."""
OFFER_ON = 10
"""And on after that, at so many times the pause."""
LEAVE_S = 3.0
"""A handover takes two at most, and then the new leader is heard at once."""
LEFT_AGAIN_S = 0.02


async def stay(to: str) -> None:
    """There is nobody to hand leadership to."""
    raise Conflict(f"{to} cannot lead")


async def leave(ledger: Ledger, transfer: Callable[[], Awaitable[None]], me: str) -> None:
    """Before node `me` stops: let another lead, and wait until that one is known to.

    Who forwards to this node has heard of the new leader by then, so nothing is cut off when its
    API ends. Returns at once where it does not lead, and after LEAVE_S in any case.
    """
    if not ledger.is_leader:
        return
    with contextlib.suppress(TimeoutError, MillError):
        async with asyncio.timeout(LEAVE_S):
            await transfer()
            while ledger.leader in (None, me):  # noqa: ASYNC110 - the log wakes nobody for it
                await asyncio.sleep(LEFT_AGAIN_S)


@dataclass
class Drain:
    """The leader's loop over draining nodes."""

    ledger: Ledger
    links: Links
    new_id: Callable[[str], str]
    transfer: Transfer = stay
    _healthy: dict[str, tuple[float, int]] = field(default_factory=dict)
    _short: dict[str, float] = field(default_factory=dict)
    _offered: int = 0
    _offer_at: float = 0.0
    _unsettled: bool = True  # another leader may have left moves in the middle

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            moved = self.links.moved
            state = self.ledger.state
            try:
                await self._look()
            except CommandRefused as refused:
                log.info("command_refused", reason=refused.what)
            changed = asyncio.create_task(self.ledger.changed(state))
            reported = asyncio.create_task(moved.wait())
            try:
                await asyncio.wait({changed, reported}, timeout=LOOK_S,
                                   return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
                reported.cancel()

    async def _look(self) -> None:
        state = self.ledger.state
        leaving = draining(state)
        if not leaving and not self._unsettled:
            return
        if await self._hand_over(state, leaving):
            return
        under_way = pairs(state)
        self._unsettled = bool(leaving or under_way)
        known = {pair.stays.id for pair in under_way}
        self._healthy = {k: v for k, v in self._healthy.items() if k in known}
        for pair in under_way:
            if pair.goes.service not in in_deploy(state) and self._over(state, pair):
                await self._retire(pair)
        for alloc in stranded(state)[: max(0, MOVES - len(under_way))]:
            await self._replace(alloc)

    # -- leadership ------------------------------------------------------------------------

    async def _hand_over(self, state: State, leaving: frozenset[str]) -> bool:
        """Offer leadership where this node is to go; True while that is waited for."""
        others = sorted(n.name for n in state.nodes.values()
                        if n.status == "ready" and not n.draining)
        if self.ledger.leader not in leaving or not others:
            self._offered = 0
            return False
        now = self.ledger.clock.monotonic()
        if self._offered and now < self._offer_at:
            return self._offered < HAND_OVER_TRIES
        self._offered += 1
        waits = self._offered < HAND_OVER_TRIES
        self._offer_at = now + HAND_OVER_AGAIN_S * (1 if waits else OFFER_ON)
        try:
            await self.transfer(others[self._offered % len(others)])
        except MillError as error:
            log.info("leadership_stays", reason=error.what)
        return waits

    # -- one move --------------------------------------------------------------------------

    def _over(self, state: State, pair: Pair) -> bool:
        """The replacement serves, and every edge knows it; or the other one is no loss."""
        if pair.stays.status != "healthy":
            self._healthy.pop(pair.stays.id, None)
            return may_go(state, pair, self.ledger.clock.wall_ms())
        now = self.ledger.clock.monotonic()
        since, index = self._healthy.setdefault(pair.stays.id, (now, state.index))
        # Right after an election no link stands yet, and none has said anything.
        connected = [link for link in self.links.all() if link.connected]
        return now - since >= ROUTED_S or (
            bool(connected) and all(link.edge_index >= index for link in connected))

    async def _retire(self, pair: Pair) -> None:
        await self.ledger.propose(
            c.RetireAlloc(pair.goes.id, pair.stays.id, was=pair.goes.status))
        log.info("alloc_moved", alloc=pair.goes.id, service=pair.goes.service,
                 node=pair.goes.node, successor=pair.stays.id, to=pair.stays.node)

    async def _replace(self, alloc: Allocation) -> None:
        now = self.ledger.clock.monotonic()
        if now < self._short.get(alloc.service, 0.0):
            return
        state = self.ledger.state
        room = room_for(state, alloc)
        service = state.services.get(alloc.service)
        if not isinstance(room, str) or service is None:
            self._short[alloc.service] = now + ROOM_AGAIN_S
            return
        self._short.pop(alloc.service, None)
        await self.ledger.propose(c.ScheduleAlloc(
            alloc=self.new_id(alloc.service), service=alloc.service, node=room, slot=alloc.slot,
            revision=service.live, replaces=alloc.id,
        ))
