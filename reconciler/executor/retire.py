"""Everything that is to stop, stopped: out of the routes, drained, TERM, gone.

Level-triggered: the state says which allocations are `stopping`, the agents say which containers
are there. What the state does not know, or knows as ended, is swept from the nodes too.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import structlog

from reconciler.executor.agent.orders import Stop
from reconciler.executor.ledger import CommandRefused, Ledger
from reconciler.executor.links import Link, Links
from reconciler.fsm import commands as c
from reconciler.fsm.records import ENDED, Allocation

log = structlog.get_logger("mill.retire")

DRAIN_S = 5.0
"""How long requests in flight to a routed allocation are waited for (contracts: Defaults)."""
REPEAT_S = 5.0
"""How often a stop is ordered again that has shown no effect."""


@dataclass
class Retire:
    """The leader's loop over allocations that stop."""

    ledger: Ledger
    links: Links
    _since: dict[str, tuple[float, int]] = field(default_factory=dict)
    _ordered: dict[str, tuple[object, float]] = field(default_factory=dict)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            moved = self.links.moved
            state = self.ledger.state
            again_s = await self._look()
            changed = asyncio.create_task(self.ledger.changed(state))
            reported = asyncio.create_task(moved.wait())
            try:
                await asyncio.wait({changed, reported}, timeout=again_s,
                                   return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
                reported.cancel()

    async def _look(self) -> float:
        """Do what can be done now; seconds after which to look again whatever happens."""
        state = self.ledger.state
        stopping = [a for a in state.allocations.values() if a.status == "stopping"]
        for alloc in sorted(stopping, key=lambda a: a.id):
            await self._retire(alloc)
        for link in self.links.all():
            if link.connected:
                self._sweep(link)
        known = {a.id for a in stopping}
        self._since = {k: v for k, v in self._since.items() if k in known}
        there = known.union(*(link.allocs for link in self.links.all()))
        self._ordered = {k: v for k, v in self._ordered.items() if k in there}
        return 0.1 if stopping else 1.0

    async def _retire(self, alloc: Allocation) -> None:
        now = self.ledger.clock.monotonic()
        since, index = self._since.setdefault(alloc.id, (now, self.ledger.state.index))
        link = self.links.get(alloc.node)
        if link is None or not link.connected:
            return  # a node that stays away becomes `down`, and its allocations `lost`
        if alloc.id in link.gone:
            link.gone.discard(alloc.id)
            await self._ended(alloc)
            return
        if alloc.routed and now - since < DRAIN_S and not self._drained(alloc, index):
            return
        self._order(alloc.id, link)

    def _drained(self, alloc: Allocation, index: int) -> bool:
        """Every live edge has taken it out, and none has a request under way to it."""
        return all(
            link.edge_index >= index and alloc.address not in link.busy
            for link in self.links.all() if link.connected
        )

    def _order(self, alloc: str, link: Link) -> None:
        now = self.ledger.clock.monotonic()
        ordered = self._ordered.get(alloc)
        if ordered and ordered[0] is link.orders and now - ordered[1] < REPEAT_S:
            return
        self._ordered[alloc] = (link.orders, now)
        link.send(Stop(term=self.ledger.term, alloc=alloc))

    async def _ended(self, alloc: Allocation) -> None:
        self._ordered.pop(alloc.id, None)
        try:
            await self.ledger.propose(
                c.SetAllocStatus(alloc=alloc.id, status="stopped", was="stopping")
            )
        except CommandRefused as refused:
            log.info("already_ended", alloc=alloc.id, reason=refused.what)

    def _sweep(self, link: Link) -> None:
        """Containers that no allocation stands for: left by a crash, or by a node that was lost."""
        allocations = self.ledger.state.allocations
        for alloc_id in link.allocs:
            alloc = allocations.get(alloc_id)
            if alloc is None or alloc.status in ENDED or alloc.node != link.node:
                self._order(alloc_id, link)
