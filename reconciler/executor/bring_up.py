"""The start stage: containers up in dependency order, healthy, and settled.

Every new allocation is watched until the deploy is decided; the first that falls takes the deploy
with it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import assert_never

from reconciler.executor.agent.orders import AllocReport
from reconciler.executor.pulling import Pulls
from reconciler.executor.stage import DeployFailed, NodeFault, Stage, how_it_ended
from reconciler.executor.starting import start_order
from reconciler.fsm import commands as c
from reconciler.fsm.records import ENDED, Allocation, Change, Failure
from reconciler.language.spec import ServiceSpec

CONFIRM_AGAIN_S = 0.5
LOOK_AGAIN_S = 1.0
"""How often an allocation without news is looked at: its record may have changed."""


@dataclass
class _Replicas:
    """The new replicas of one service that are healthy now; `all_well` while all of them are."""

    wanted: int
    falls: int = 0
    all_well: asyncio.Event = field(default_factory=asyncio.Event)
    _well: set[int] = field(default_factory=set)

    def rise(self, slot: int) -> None:
        """The slot's replica is healthy."""
        self._well.add(slot)
        if len(self._well) >= self.wanted:
            self.all_well.set()

    def fall(self, slot: int) -> None:
        """It is not any more: its node failed it, and it is started anew."""
        self._well.discard(slot)
        self.falls += 1
        self.all_well.clear()


@dataclass
class BringUp:
    """The new allocations of one deploy."""

    stage: Stage
    _passed: dict[str, asyncio.Event] = field(default_factory=dict)
    _replicas: dict[str, _Replicas] = field(default_factory=dict)

    async def run(self) -> None:
        """Each service starts when those it depends on have passed; all are watched until every
        one has settled, and the first that falls takes the deploy with it."""
        starting = [c_ for c_ in self.stage.deploy.changes if c_.action in ("create", "update")]
        self._passed = {change.service: asyncio.Event() for change in starting}
        self._replicas = {
            change.service: _Replicas(sum(not slot.keep for slot in change.slots))
            for change in starting
        }
        async with asyncio.TaskGroup() as group:
            watchers: list[asyncio.Task[None]] = []
            for change in starting:
                watchers.append(group.create_task(self._service(change)))
            await asyncio.gather(*(event.wait() for event in self._passed.values()))
            await self._settled(starting)
            for watcher in watchers:
                watcher.cancel()

    async def _settled(self, starting: list[Change]) -> None:
        """All replicas are healthy and stay so; one that had to move settles from the start."""
        replicas = [r for r in self._replicas.values() if r.wanted]
        while True:
            await asyncio.gather(*(r.all_well.wait() for r in replicas))
            falls = sum(r.falls for r in replicas)
            await self._settle(starting)
            if falls == sum(r.falls for r in replicas):
                return

    async def _settle(self, starting: list[Change]) -> None:
        """What replaces something live must still be healthy a moment later; what is new has
        nothing to protect. The watchers fail the deploy if something falls meanwhile."""
        bakes = [
            self.stage.spec(change).bake_ms
            for change in starting
            if change.action == "update" and any(not slot.keep for slot in change.slots)
        ]
        if bakes:
            await asyncio.sleep(max(bakes) / 1000)

    async def _service(self, change: Change) -> None:
        spec = self.stage.spec(change)
        for needed in spec.depends_on:
            if needed in self._passed:
                await self._passed[needed].wait()
        replicas = self._replicas[change.service]
        numbers = [n for n, slot in enumerate(change.slots) if not slot.keep]
        async with asyncio.TaskGroup() as group:
            for number in numbers:
                group.create_task(self._slot(change, number, replicas))
            if numbers:
                await replicas.all_well.wait()
            if numbers and change.service not in self.stage.deploy.healthy:
                await self.stage.say(c.PassService(
                    self.stage.deploy_id, change.service, self._since_first_start(change.service)))
            self._passed[change.service].set()

    def _since_first_start(self, service: str) -> int:
        starts = [
            a.started_ms for a in self.stage.ledger.state.of_deploy(self.stage.deploy_id)
            if a.service == service and a.started_ms
        ]
        return max(0, self.stage.ledger.clock.wall_ms() - min(starts)) if starts else 0

    async def _slot(self, change: Change, number: int, replicas: _Replicas) -> None:
        """Fill one slot; a node's fault is given one more try on another node."""
        alloc = self.stage.alloc_of(change.service, number)
        while alloc is not None:
            try:
                await self._watch(change, alloc, replicas)
                return
            except NodeFault as fault:
                replicas.fall(number)
                alloc = await self._elsewhere(change, fault)

    async def _elsewhere(self, change: Change, fault: NodeFault) -> Allocation:
        alloc = self.stage.ledger.state.allocations[fault.alloc.id]
        if alloc.status not in ENDED:
            await self.stage.say(c.SetAllocStatus(alloc=alloc.id, status="failed", was=alloc.status,
                                             reason=str(fault)))
        node = self.stage.elsewhere(
            self.stage.ledger.state, self.stage.spec(change), change.digest, alloc.node,
        ) if alloc.attempt == 0 else None
        if node is None:
            raise DeployFailed(Failure(
                reason=f"{alloc.node} could not run {alloc.id}: {fault}",
                service=alloc.service, alloc=alloc.id, node=alloc.node, outside=True,
            ))
        new = self.stage.new_id(alloc.service)
        if not await self.stage.say(c.ScheduleAlloc(
            alloc=new, service=alloc.service, node=node, slot=alloc.slot,
            deploy=self.stage.deploy_id, attempt=alloc.attempt + 1, replaces=alloc.id,
        )):
            raise DeployFailed(Failure(reason=f"{alloc.service} could not be placed on {node}",
                                       service=alloc.service, node=node, outside=True))
        placed = self.stage.ledger.state.allocations[new]
        await Pulls(self.stage).one(placed)
        return placed

    async def _watch(self, change: Change, first: Allocation, replicas: _Replicas) -> None:
        """Start an allocation, log what it becomes, and stay until the deploy is decided."""
        if first.status == "pending":
            await self.stage.say(c.SetAllocStatus(alloc=first.id, status="starting", was="pending"))
        told = False
        sent_to: object = None
        while True:
            moved = self.stage.links.moved_of(first.id)
            alloc = self.stage.alloc(first.id)
            if alloc.status in ENDED:
                raise NodeFault(alloc, alloc.reason or f"it is {alloc.status}")
            report, sent_to = self._ask(alloc, sent_to)
            if self._vanished(alloc):
                told = False
                replicas.fall(alloc.slot)
                await self.stage.say(c.SetAllocStatus(
                    alloc=alloc.id, status="starting", was=alloc.status,
                    reason="its container was gone"))
                continue
            if report is not None:
                await self._judge(alloc, report)
                alloc = self.stage.alloc(first.id)
            if alloc.status == "healthy" and report is not None and report.healthy and not told:
                told = True
                replicas.rise(alloc.slot)
            await self._wait(moved, alloc, report, self.stage.spec(change),
                             told=alloc.status == "healthy")

    def _ask(self, alloc: Allocation, sent_to: object) -> tuple[AllocReport | None, object]:
        """What the agent says of the allocation; the order again where its stream is another."""
        link = self.stage.links.get(alloc.node)
        if link is None or not link.connected or alloc.status == "stopping":
            return None, sent_to
        if alloc.id in link.gone:
            link.gone.discard(alloc.id)
            sent_to = None
        if sent_to is not link.orders:
            order = start_order(self.stage.ledger.state, alloc, self.stage.ledger.term)
            if order is not None:
                link.send(order)
                sent_to = link.orders
        return link.allocs.get(alloc.id), sent_to

    def _vanished(self, alloc: Allocation) -> bool:
        """It ran, and its node, which answers, has never heard of it: power was cut."""
        link = self.stage.links.get(alloc.node)
        return (alloc.status in ("running", "healthy") and link is not None and link.connected
                and alloc.id not in link.allocs)

    async def _judge(self, alloc: Allocation, report: AllocReport) -> None:
        """Log progress; raise where it is the end."""
        where = f"{alloc.id} on {alloc.node}"
        match report.phase:
            case "error" if report.node_fault:
                raise NodeFault(alloc, report.error)
            case "error":
                raise self._failed(alloc, report, f"{where} cannot start: {report.error}")
            case "exited":
                raise self._failed(alloc, report, f"{where} {how_it_ended(report)}")
            case "running":
                if alloc.status == "starting":
                    await self.stage.say(
                        c.SetAllocStatus(alloc=alloc.id, status="running", was="starting")
                    )
                    alloc = self.stage.alloc(alloc.id)
                if report.healthy and alloc.status == "running" \
                        and await self._confirmed(alloc):
                    await self.stage.say(c.SetAllocStatus(
                        alloc=alloc.id, status="healthy", was="running",
                        elapsed_ms=self._since_first_start(alloc.service),
                    ))
                if report.healthy is False and alloc.status == "healthy":
                    raise self._failed(alloc, report, f"{where} became unhealthy: {report.detail}")
            case "absent" | "starting":
                pass
            case _:
                assert_never(report.phase)

    async def _confirmed(self, alloc: Allocation) -> bool:
        """The leader sees it too; where not, it looks again in a moment."""
        spec = self.stage.ledger.state.spec_for(alloc)
        if spec is None or not await self.stage.confirm(alloc, spec):
            return True
        asyncio.get_running_loop().call_later(
            CONFIRM_AGAIN_S, self.stage.links.wake_watchers, alloc.id)
        return False

    async def _wait(
        self, moved: asyncio.Event, alloc: Allocation, report: AllocReport | None,
        spec: ServiceSpec, *, told: bool,
    ) -> None:
        """Wait for the next report, for LOOK_AGAIN_S at most; raise where a first pass is overdue.

        The state may have moved without a report: a node that is lost says nothing."""
        deadline_ms = alloc.started_ms + spec.health.deadline_ms
        left_s = (deadline_ms - self.stage.ledger.clock.wall_ms()) / 1000
        wait_s = LOOK_AGAIN_S if told else min(LOOK_AGAIN_S, max(0.0, left_s))
        try:
            async with asyncio.timeout(wait_s):
                await moved.wait()
        except TimeoutError:
            if told or left_s > LOOK_AGAIN_S:
                return
            link = self.stage.links.get(alloc.node)
            if link is None or not link.connected:
                raise NodeFault(alloc, "the node does not answer") from None
            detail = report.detail if report and report.detail else "no answer yet"
            raise self._failed(
                alloc, report,
                f"{alloc.id} on {alloc.node} was not healthy within "
                f"{spec.health.deadline_ms / 1000:g} s: {detail}",
            ) from None

    def _failed(self, alloc: Allocation, report: AllocReport | None, reason: str) -> DeployFailed:
        return DeployFailed(Failure(
            reason=reason, service=alloc.service, alloc=alloc.id, node=alloc.node,
            logs=report.tail if report else (),
        ))
