"""Living on: what is live and should run, runs; the leader decides, the agents carry it out.

Level-triggered over the live allocations: exits and failed probes leave the routes at once and
are started again with backoff; a slot whose allocation is lost is filled on another node.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import assert_never

import structlog

from reconciler.errors import MillError
from reconciler.executor.agent.orders import AllocReport
from reconciler.executor.ledger import CommandRefused, Ledger
from reconciler.executor.links import Link, Links
from reconciler.executor.stage import how_it_ended
from reconciler.executor.starting import start_order
from reconciler.fsm import commands as c
from reconciler.fsm.records import ENDED, Allocation
from reconciler.fsm.state import State
from reconciler.language.spec import ServiceSpec
from reconciler.plan.place import Demand, Shortage, images, place, reserved, standing

log = structlog.get_logger("mill.heal")

BACKOFF_S = (1.0, 5.0, 30.0, 60.0)
"""Waits before the first, second, third and every later restart (contracts: Defaults)."""
STEADY_MS = 10 * 60 * 1000
"""One that served this long before it ended is started again as if for the first time."""
LOOK_S = 0.5
GATHER_S = 0.02
"""Reports come in bursts, and a look is over all that is live: one look for a burst."""
STALL_S = 5.0
"""A leader that did not look for so long cannot call a node silent."""
DOWN_S = 15.0
"""A node that is silent this long is down (contracts: Defaults)."""


def another_node(state: State, spec: ServiceSpec, digest: str, not_on: str) -> str | None:
    """The best node for one more replica of a service, the node `not_on` left out."""
    return free_node(state, spec.name, spec.cpu_milli, spec.memory_bytes, digest,
                     {name for name in state.nodes if name != not_on})


def free_node(
    state: State, service: str, cpu_milli: int, memory_bytes: int, digest: str, allowed: set[str]
) -> str | None:
    """Where one more replica goes, by the rules that every plan follows; None: nowhere."""
    found = find_room(state, service, cpu_milli, memory_bytes, digest, allowed)
    return found if isinstance(found, str) else None


def find_room(
    state: State, service: str, cpu_milli: int, memory_bytes: int, digest: str, allowed: set[str]
) -> str | Shortage:
    """The node where one more replica goes, or what is short. Only a ready node takes one."""
    nodes = {n.name: n for n in state.nodes.values() if n.name in allowed}
    there = standing(state.of_service(service), nodes)
    demand = Demand(service=service, cpu_milli=cpu_milli, memory_bytes=memory_bytes,
                    replicas=len(there) + 1, digest=digest, standing=there)
    placed = place([demand], nodes.values(), reserved(state), images(state))
    if placed.shortages:
        return placed.shortages[0]
    return next(slot.node for slot in placed.slots[service] if not slot.keep)


def backoff_s(alloc: Allocation, now_ms: int) -> float:
    """How long an allocation that has ended waits for its next start."""
    steady = alloc.healthy_ms > alloc.started_ms and now_ms - alloc.healthy_ms >= STEADY_MS
    return BACKOFF_S[0 if steady else min(alloc.restarts, len(BACKOFF_S) - 1)]


@dataclass
class Heal:
    """The leader's loop over live services and over the nodes' heartbeats."""

    ledger: Ledger
    links: Links
    new_id: Callable[[str], str]
    _sent: dict[str, tuple[object, int]] = field(default_factory=dict)
    _due: dict[str, float] = field(default_factory=dict)
    _looked_at: float = float("inf")

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            moved = self.links.moved
            try:
                await self._look()
            except CommandRefused as refused:
                log.info("command_refused", reason=refused.what)
            except MillError as error:
                log.warning("heal_waits", reason=error.what)
            try:
                async with asyncio.timeout(LOOK_S):
                    await moved.wait()
                await asyncio.sleep(GATHER_S)
            except TimeoutError:
                pass

    async def _look(self) -> None:
        await self._nodes()
        for alloc_id in list(self.ledger.state.allocations):
            # Looked up anew: every command in between may have moved it, or let it end.
            alloc = self.ledger.state.allocations.get(alloc_id)
            if alloc and alloc.live and alloc.status not in ENDED and alloc.status != "stopping":
                try:
                    await self._alloc(alloc)
                except CommandRefused as refused:
                    log.info("command_refused", alloc=alloc_id, reason=refused.what)
        await self._vacant()
        self._forget()

    def _forget(self) -> None:
        """Nothing is remembered of allocations that are live no more."""
        allocs = self.ledger.state.allocations
        self._sent = {k: v for k, v in self._sent.items() if k in allocs and allocs[k].live}
        self._due = {k: v for k, v in self._due.items() if k in allocs and allocs[k].live}

    # -- nodes -----------------------------------------------------------------------------

    async def _nodes(self) -> None:
        now = self.ledger.clock.monotonic()
        if now - self._looked_at > STALL_S:
            # This process itself stood still: what the nodes said meanwhile is not read yet.
            for seen in self.links.all():
                seen.seen_at = max(seen.seen_at, now)
        self._looked_at = now
        for node in list(self.ledger.state.nodes.values()):
            link = self.links.get(node.name)
            if link is None:
                continue
            silent_s = now - link.seen_at
            if node.status != "down" and silent_s > DOWN_S:
                reason = f"silent for {silent_s:.0f} s"
                await self.ledger.propose(c.SetNodeStatus(node.name, "down", reason))
                self.links.wake()  # who waits for a report of this node need wait no longer
            elif node.status == "down" and link.connected and silent_s < DOWN_S:
                await self.ledger.propose(c.SetNodeStatus(node.name, "ready", "it answers again"))

    # -- allocations -----------------------------------------------------------------------

    async def _alloc(self, alloc: Allocation) -> None:
        link = self.links.get(alloc.node)
        if link is None or not link.connected:
            return
        if alloc.id in link.gone:
            link.gone.discard(alloc.id)
            self._sent.pop(alloc.id, None)
        report = link.allocs.get(alloc.id)
        if report is None or report.restarts < alloc.restarts:
            self._order(alloc, link)
            if alloc.status == "pending":
                await self._move(alloc, "starting")
            elif alloc.status == "healthy":
                await self._move(alloc, "running", "its container is gone")
            return
        match report.phase:
            case "exited" | "error":
                await self._ended(alloc, link, report)
            case "running":
                await self._running(alloc, link, report)
            case "absent" | "starting":
                pass
            case _:
                assert_never(report.phase)

    def _order(self, alloc: Allocation, link: Link) -> None:
        """Order a start once a stream and incarnation; the agent answers with what is."""
        token = (link.orders, alloc.restarts)
        if self._sent.get(alloc.id) == token:
            return
        order = start_order(self.ledger.state, alloc, self.ledger.term)
        if order is not None:
            self._sent[alloc.id] = token
            link.send(order)

    async def _move(self, alloc: Allocation, status: str, reason: str = "") -> None:
        await self.ledger.propose(c.SetAllocStatus(
            alloc=alloc.id, status=status, was=alloc.status, reason=reason,  # type: ignore[arg-type]  # the callers name states
        ))

    async def _running(self, alloc: Allocation, link: Link, report: AllocReport) -> None:
        if alloc.status == "pending":  # a leader ordered it, and died before it could say so
            await self._move(alloc, "starting")
            self.links.wake()
        elif alloc.status == "starting":
            await self._move(alloc, "running")
        elif alloc.status == "running" and report.healthy:
            self._due.pop(alloc.id, None)
            await self._move(alloc, "healthy")
        elif alloc.status == "healthy" and report.healthy is False:
            await self._move(alloc, "running", f"unhealthy: {report.detail}")
        elif alloc.status == "running" and report.healthy is False and self._may_restart(alloc):
            await self._restart(alloc, link, f"unhealthy: {report.detail}", None)

    def _may_restart(self, alloc: Allocation) -> bool:
        """A failing probe restarts while half of the replicas are healthy, or it is alone."""
        mates = [a for a in self.ledger.state.of_service(alloc.service) if a.live]
        well = sum(a.status == "healthy" for a in mates)
        return len(mates) == 1 or 2 * well >= len(mates)

    async def _ended(self, alloc: Allocation, link: Link, report: AllocReport) -> None:
        reason = report.error or how_it_ended(report)
        if alloc.status == "healthy":
            await self._move(alloc, "running", reason)
            return
        await self._restart(alloc, link, reason, report.exit_code)

    async def _restart(
        self, alloc: Allocation, link: Link, reason: str, exit_code: int | None
    ) -> None:
        now = self.ledger.clock.monotonic()
        wait_s = backoff_s(alloc, self.ledger.clock.wall_ms())
        due = self._due.setdefault(alloc.id, now + wait_s)
        if now < due:
            return
        del self._due[alloc.id]
        await self.ledger.propose(c.SetAllocStatus(
            alloc=alloc.id, status="starting", was=alloc.status, reason=reason,
            exit_code=exit_code, restarts=alloc.restarts + 1,
        ))
        log.info("alloc_restarted", alloc=alloc.id, service=alloc.service, node=alloc.node,
                 restarts=alloc.restarts + 1, reason=reason)
        self._order(self.ledger.state.allocations[alloc.id], link)

    # -- vacant slots ----------------------------------------------------------------------

    async def _vacant(self) -> None:
        """Fill the slots whose allocations were lost with their node."""
        state = self.ledger.state
        held_by: dict[str, set[int]] = {}
        for alloc in state.allocations.values():
            if alloc.live and alloc.status not in ENDED:
                held_by.setdefault(alloc.service, set()).add(alloc.slot)
        for name in sorted(state.services):
            spec = state.live_spec(name)
            service = state.services.get(name)  # what was proposed meanwhile may have removed it
            revision = service.revision(service.live) if service else None
            if spec is None or revision is None:
                continue
            held = held_by.get(name, set())
            for slot in range(spec.replicas):
                if slot in held:
                    continue
                ready = {n.name for n in state.nodes.values() if n.status == "ready"}
                node = free_node(state, name, spec.cpu_milli, spec.memory_bytes,
                                 revision.digest, ready)
                if node is None:
                    continue
                await self.ledger.propose(c.ScheduleAlloc(
                    alloc=self.new_id(name), service=name, node=node, slot=slot,
                    revision=revision.number,
                ))
                state = self.ledger.state
