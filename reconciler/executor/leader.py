"""What runs while this node leads: links, the deploy in flight, retiring, healing, trimming.

One owner for all of it: gaining leadership starts it, losing it cancels it, and whatever was in
the middle is taken up from the log by the next leader.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from reconciler.errors import MillError
from reconciler.executor.confirm import Confirm, believe
from reconciler.executor.deploy import Pipeline
from reconciler.executor.drain import Drain, Transfer, stay
from reconciler.executor.heal import Heal, another_node
from reconciler.executor.ledger import Ledger
from reconciler.executor.links import Links
from reconciler.executor.retire import Retire
from reconciler.executor.stage import Stage
from reconciler.fsm import commands as c

log = structlog.get_logger("mill.leader")

TRIM_EVERY_S = 300.0
KEEP_MS = 24 * 3600 * 1000
"""Ended allocations, deploys and events are kept a day (contracts: Defaults)."""
RETRY_S = 0.2

Loop = Callable[[int], Awaitable[None]]


@dataclass
class Leader:
    """The loops of a leader. `others` are further loops that lead here too, such as sources;
    `transfer` hands leadership over, where this node is to be drained."""

    ledger: Ledger
    links: Links
    new_id: Callable[[str], str]
    others: tuple[Loop, ...] = ()
    confirm: Confirm = believe
    transfer: Transfer = stay

    async def run(self, term: int) -> None:
        """Lead in `term` until cancelled."""
        log.info("leading", term=term)
        loops: list[tuple[str, Loop]] = [
            ("links", self.links.run),
            ("deploys", self._deploys),
            ("retire", lambda _: Retire(self.ledger, self.links).run()),
            ("heal", lambda _: Heal(self.ledger, self.links, self.new_id).run()),
            ("drain", lambda _: Drain(self.ledger, self.links, self.new_id, self.transfer).run()),
            ("trim", self._trim),
            *((getattr(loop, "__qualname__", "other"), loop) for loop in self.others),
        ]
        try:
            async with asyncio.TaskGroup() as group:
                for name, loop in loops:
                    group.create_task(self._keep(name, loop, term))
        finally:
            log.info("leading_no_more", term=term)

    async def _keep(self, name: str, loop: Loop, term: int) -> None:
        """A loop that stumbles is started again: it looks at the state and goes on from there."""
        while True:
            try:
                await loop(term)
            except MillError as error:
                log.warning("loop_stumbled", loop=name, reason=error.what)
            except Exception:
                log.exception("loop_failed", loop=name)
            await asyncio.sleep(RETRY_S)

    async def _deploys(self, _term: int) -> None:
        while True:
            state = await self.ledger.until(lambda s: bool(s.active_deploy))
            stage = Stage(self.ledger, self.links, state.active_deploy, self.new_id,
                          another_node, self.confirm)
            await Pipeline(stage).run()

    async def _trim(self, _term: int) -> None:
        while True:
            await asyncio.sleep(TRIM_EVERY_S)
            before_ms = self.ledger.clock.wall_ms() - KEEP_MS
            await self.ledger.propose(c.Trim(before_ms))
