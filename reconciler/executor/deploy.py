"""A deploy, driven from its first fact to its terminal event: schedule, pull, start, health,
settle, commit, route, retire; or back.

Every step first asks the state whether it is done already. So the same code begins a deploy and
takes over one that another leader left in the middle: what the log says is never done twice, and
what runs on the nodes is found again through the agents' inventories.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import assert_never

import structlog

from reconciler.executor.agent.orders import AllocReport, PullReport
from reconciler.executor.ledger import CommandRefused, Ledger
from reconciler.executor.links import Links
from reconciler.executor.starting import pull_order, start_order
from reconciler.fsm import commands as c
from reconciler.fsm.apply_deploys import changed
from reconciler.fsm.records import ENDED, Allocation, Change, Deploy, Failure
from reconciler.fsm.state import State
from reconciler.language.spec import ServiceSpec

log = structlog.get_logger("mill.deploy")

PULL_TRIES = 4
PULL_BACKOFF_S = (0.5, 2.0, 5.0)
EDGE_CONFIRM_S = 5.0
"""An edge that is silent this long after a commit becomes a warning (contracts)."""
RETIRE_S = 35.0
"""`done` waits no longer than the drain (5 s) and 30 s for the old allocations to end."""
UNDO_S = 60.0
"""A rollback that cannot stop what it started within this is `rollback_failed`."""
INVENTORY_S = 5.0
"""How long a starting deploy waits for the agents it needs to say what they have."""


class DeployFailed(Exception):
    """The deploy cannot go on; carries what the terminal event will say."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


class NodeFault(Exception):
    """The node failed the allocation, not the version: another node may do better."""

    def __init__(self, alloc: Allocation, reason: str) -> None:
        super().__init__(reason)
        self.alloc = alloc


@dataclass
class Pipeline:
    """One deploy on its way. `elsewhere` names another node for a slot that its node failed;
    `new_id` makes an allocation's id."""

    ledger: Ledger
    links: Links
    deploy_id: str
    new_id: Callable[[str], str]
    elsewhere: Callable[[State, Allocation], str | None]
    _passed: dict[str, asyncio.Event] = field(default_factory=dict)

    @property
    def deploy(self) -> Deploy:
        """The deploy as the log has it now."""
        return self.ledger.state.deploys[self.deploy_id]

    async def run(self) -> None:
        """Drive the deploy to its terminal event. Returns when it is in the log."""
        if self.deploy.outcome == "running" and not self.deploy.committed:
            await self._forward_or_back()
        if self.deploy.outcome == "rolling_back":
            await self._undo()
        elif self.deploy.outcome == "running":
            await self._finish()

    async def _forward_or_back(self) -> None:
        left_s = (self.deploy.deadline_ms - self.ledger.clock.wall_ms()) / 1000
        forward = asyncio.create_task(self._forward())
        ended = asyncio.create_task(self.ledger.until(self._is_over))
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                await asyncio.wait({forward, ended}, return_when=asyncio.FIRST_COMPLETED)
            if forward.done():
                await forward
        except TimeoutError:
            await self._fail(Failure(reason="the deploy's deadline passed"))
        except DeployFailed as error:
            await self._fail(error.failure)
        finally:
            for task in (forward, ended):
                task.cancel()
            await asyncio.gather(forward, ended, return_exceptions=True)

    def _is_over(self, state: State) -> bool:
        """True once a cancel (or another hand) has ended the way forward."""
        return state.deploys[self.deploy_id].outcome != "running"

    async def _fail(self, failure: Failure) -> None:
        log.warning("deploy_failed", deploy=self.deploy_id, reason=failure.reason,
                    service=failure.service, alloc=failure.alloc, node=failure.node)
        await self._say(c.RollBackDeploy(self.deploy_id, failure))

    async def _say(self, command: c.AnyCommand) -> bool:
        """Propose; False where the state has moved past it, which the next look will show."""
        try:
            await self.ledger.propose(command)
        except CommandRefused as refused:
            log.info("command_refused", deploy=self.deploy_id, command=type(command).__name__,
                     reason=refused.what)
            return False
        return True

    # -- forward ---------------------------------------------------------------------------

    async def _forward(self) -> None:
        try:
            if self._to_start():
                if not self.deploy.pulls_begun:
                    await self._say(c.BeginPulls(self.deploy_id))
            for message in self.deploy.warnings[self.deploy.warned :]:
                await self._say(c.WarnDeploy(self.deploy_id, message))
            if self._to_start():
                await self._schedule()
                await self._connected()
                await self._pull()
            await self._start()
        except* DeployFailed as failures:
            raise _first(failures) from None
        await self._commit()

    def _to_start(self) -> list[tuple[Change, int]]:
        """The slots that need a new container, in the order of the manifest's services."""
        return [
            (change, number)
            for change in self.deploy.changes
            if change.action in ("create", "update")
            for number, slot in enumerate(change.slots)
            if not slot.keep
        ]

    def _spec(self, change: Change) -> ServiceSpec:
        return self.ledger.state.specs[change.spec_hash]

    def _alloc_of(self, service: str, slot: int) -> Allocation | None:
        """The newest attempt at a slot; an ended one only where none goes on."""
        tries = [
            a for a in self.ledger.state.of_deploy(self.deploy_id)
            if a.service == service and a.slot == slot
        ]
        return max(tries, key=lambda a: (a.status not in ENDED, a.attempt), default=None)

    async def _schedule(self) -> None:
        missing = [
            c.ScheduleAlloc(
                alloc=self.new_id(change.service), service=change.service,
                node=change.slots[number].node, slot=number, deploy=self.deploy_id,
            )
            for change, number in self._to_start()
            if self._alloc_of(change.service, number) is None
        ]
        results = await asyncio.gather(*map(self._say, missing))
        for command, placed in zip(missing, results, strict=True):
            if not placed and not self._is_over(self.ledger.state):
                raise DeployFailed(Failure(
                    reason=f"{command.service} could not be placed on {command.node}",
                    service=command.service, node=command.node,
                ))

    async def _connected(self) -> None:
        """The agents' inventories say what is there already, so wait for them a moment."""
        nodes = {a.node for a in self.ledger.state.of_deploy(self.deploy_id)}

        def all_known() -> bool:
            links = [self.links.get(node) for node in nodes]
            return all(link is not None and link.connected for link in links)

        try:
            async with asyncio.timeout(INVENTORY_S):
                await self.links.until(all_known)
        except TimeoutError:
            log.info("agents_not_all_connected", deploy=self.deploy_id)

    # -- pull ------------------------------------------------------------------------------

    async def _pull(self) -> None:
        wanted: dict[tuple[str, str], Allocation] = {}
        for alloc in self.ledger.state.of_deploy(self.deploy_id):
            if alloc.status not in ENDED:
                wanted.setdefault((alloc.image, alloc.node), alloc)
        async with asyncio.TaskGroup() as group:
            for (image, node), alloc in sorted(wanted.items()):
                if (image, node) not in self.deploy.pulled:
                    group.create_task(self._pull_one(alloc))
        if not self.deploy.pulls_done:
            await self._say(c.FinishPulls(self.deploy_id))

    async def _pull_one(self, alloc: Allocation) -> None:
        key = (alloc.image, alloc.digest)
        link = self.links.get(alloc.node)
        if link is not None and link.connected and key in link.images:
            await self._say(c.RecordPull(self.deploy_id, alloc.image, alloc.node, cached=True))
            return
        for attempt in range(PULL_TRIES):
            report = await self._pulled(alloc)
            if report is None:
                return  # the node is lost: its allocations are placed elsewhere and pull there
            if report.state == "done":
                await self._say(
                    c.RecordPull(self.deploy_id, alloc.image, alloc.node, report.cached)
                )
                return
            if report.final or attempt == PULL_TRIES - 1:
                raise DeployFailed(Failure(
                    reason=f"cannot pull {alloc.image}: {report.error}",
                    service=alloc.service, alloc=alloc.id, node=alloc.node,
                    outside=not report.final,
                ))
            await asyncio.sleep(PULL_BACKOFF_S[attempt])

    async def _pulled(self, alloc: Allocation) -> PullReport | None:
        """Order the image and wait for how it went; None where the node is lost meanwhile."""
        key = (alloc.image, alloc.digest)
        sent_to: object = None
        while True:
            moved = self.links.moved
            if self.ledger.state.allocations[alloc.id].status in ENDED:
                return None
            link = self.links.get(alloc.node)
            if link is not None and link.connected:
                report = link.pulls.get(key)
                if sent_to is link.orders and report and report.state != "pulling":
                    return report
                if sent_to is not link.orders:
                    sent_to = link.orders  # another stream: what the old one was told is gone
                    link.pulls.pop(key, None)
                    link.send(pull_order(self.ledger.state, alloc, self.ledger.term))
            await moved.wait()

    # -- start and health ------------------------------------------------------------------

    async def _start(self) -> None:
        """Each service starts when those it depends on have passed; all are watched until every
        one has settled, and the first that falls takes the deploy with it."""
        starting = [c_ for c_ in self.deploy.changes if c_.action in ("create", "update")]
        self._passed = {change.service: asyncio.Event() for change in starting}
        async with asyncio.TaskGroup() as group:
            watchers: list[asyncio.Task[None]] = []
            for change in starting:
                watchers.append(group.create_task(self._service(change)))
            await asyncio.gather(*(event.wait() for event in self._passed.values()))
            await self._settle(starting)
            for watcher in watchers:
                watcher.cancel()

    async def _settle(self, starting: list[Change]) -> None:
        """What replaces something live must still be healthy a moment later; what is new has
        nothing to protect. The watchers fail the deploy if something falls meanwhile."""
        bakes = [
            self._spec(change).bake_ms
            for change in starting
            if change.action == "update" and any(not slot.keep for slot in change.slots)
        ]
        if bakes:
            await asyncio.sleep(max(bakes) / 1000)

    async def _service(self, change: Change) -> None:
        spec = self._spec(change)
        for needed in spec.depends_on:
            if needed in self._passed:
                await self._passed[needed].wait()
        healthy = asyncio.Semaphore(0)
        numbers = [n for n, slot in enumerate(change.slots) if not slot.keep]
        async with asyncio.TaskGroup() as group:
            for number in numbers:
                group.create_task(self._slot(change, number, healthy))
            for _ in numbers:
                await healthy.acquire()
            if numbers and change.service not in self.deploy.healthy:
                elapsed_ms = self._since_first_start(change.service)
                await self._say(c.PassService(self.deploy_id, change.service, elapsed_ms))
            self._passed[change.service].set()

    def _since_first_start(self, service: str) -> int:
        starts = [
            a.started_ms for a in self.ledger.state.of_deploy(self.deploy_id)
            if a.service == service and a.started_ms
        ]
        return max(0, self.ledger.clock.wall_ms() - min(starts)) if starts else 0

    async def _slot(self, change: Change, number: int, healthy: asyncio.Semaphore) -> None:
        """Fill one slot; a node's fault is given one more try on another node."""
        alloc = self._alloc_of(change.service, number)
        while alloc is not None:
            try:
                await self._watch(change, alloc, healthy)
                return
            except NodeFault as fault:
                alloc = await self._elsewhere(fault)

    async def _elsewhere(self, fault: NodeFault) -> Allocation:
        alloc = self.ledger.state.allocations[fault.alloc.id]
        if alloc.status not in ENDED:
            await self._say(c.SetAllocStatus(alloc=alloc.id, status="failed", was=alloc.status,
                                             reason=str(fault)))
        node = self.elsewhere(self.ledger.state, alloc) if alloc.attempt == 0 else None
        if node is None:
            raise DeployFailed(Failure(
                reason=f"{alloc.node} could not run {alloc.id}: {fault}",
                service=alloc.service, alloc=alloc.id, node=alloc.node, outside=True,
            ))
        new = self.new_id(alloc.service)
        if not await self._say(c.ScheduleAlloc(
            alloc=new, service=alloc.service, node=node, slot=alloc.slot,
            deploy=self.deploy_id, attempt=alloc.attempt + 1, replaces=alloc.id,
        )):
            raise DeployFailed(Failure(reason=f"{alloc.service} could not be placed on {node}",
                                       service=alloc.service, node=node))
        placed = self.ledger.state.allocations[new]
        await self._pull_one(placed)
        return placed

    async def _watch(self, change: Change, first: Allocation, healthy: asyncio.Semaphore) -> None:
        """Start an allocation, log what it becomes, and stay until the deploy is decided."""
        if first.status == "pending":
            await self._say(c.SetAllocStatus(alloc=first.id, status="starting", was="pending"))
        told = False
        sent_to: object = None
        while True:
            moved = self.links.moved
            alloc = self.ledger.state.allocations[first.id]
            if alloc.status in ENDED:
                raise NodeFault(alloc, alloc.reason or f"it is {alloc.status}")
            report, sent_to = self._ask(alloc, sent_to)
            if report is not None:
                await self._judge(alloc, report)
                alloc = self.ledger.state.allocations[first.id]
            if alloc.status == "healthy" and not told:
                told = True
                healthy.release()
            await self._wait(moved, alloc, report, self._spec(change), told=told)

    def _ask(self, alloc: Allocation, sent_to: object) -> tuple[AllocReport | None, object]:
        """What the agent says of the allocation; the order again where its stream is another."""
        link = self.links.get(alloc.node)
        if link is None or not link.connected:
            return None, sent_to
        if sent_to is not link.orders:
            order = start_order(self.ledger.state, alloc, self.ledger.term)
            if order is not None:
                link.send(order)
                sent_to = link.orders
        return link.allocs.get(alloc.id), sent_to

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
                    await self._say(
                        c.SetAllocStatus(alloc=alloc.id, status="running", was="starting")
                    )
                    alloc = self.ledger.state.allocations[alloc.id]
                if report.healthy and alloc.status == "running":
                    await self._say(c.SetAllocStatus(
                        alloc=alloc.id, status="healthy", was="running",
                        elapsed_ms=self._since_first_start(alloc.service),
                    ))
                if report.healthy is False and alloc.status == "healthy":
                    raise self._failed(alloc, report, f"{where} became unhealthy: {report.detail}")
            case "absent" | "starting":
                pass
            case _:
                assert_never(report.phase)

    async def _wait(
        self, moved: asyncio.Event, alloc: Allocation, report: AllocReport | None,
        spec: ServiceSpec, *, told: bool,
    ) -> None:
        """Wait for the next report, but for a first pass no longer than the health deadline."""
        if told:
            await moved.wait()
            return
        deadline_ms = alloc.started_ms + spec.health.deadline_ms
        left_s = (deadline_ms - self.ledger.clock.wall_ms()) / 1000
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                await moved.wait()
        except TimeoutError:
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

    # -- commit, route, retire -------------------------------------------------------------

    async def _commit(self) -> None:
        """One entry flips everything. Refused: something fell in the last moment."""
        if not self.deploy.changes or self.deploy.committed:
            return
        try:
            await self.ledger.propose(c.CommitDeploy(self.deploy_id))
        except CommandRefused as refused:
            if self._is_over(self.ledger.state):
                return
            raise DeployFailed(Failure(reason=refused.what)) from refused

    async def _finish(self) -> None:
        """After the commit there is only forward."""
        if changed(self.deploy):
            if not self.deploy.routed:
                for node in await self._unconfirmed():
                    await self._say(c.WarnDeploy(
                        self.deploy_id, f"the edge of {node} has not confirmed the new routes"
                    ))
                await self._say(c.RouteDeploy(self.deploy_id))
            await self._retired()
        await self._say(c.FinishDeploy(self.deploy_id))

    async def _unconfirmed(self) -> list[str]:
        """Wait for every live edge to serve the commit; the names of those that do not."""
        index = self.ledger.state.index

        def late() -> list[str]:
            nodes = self.ledger.state.nodes
            return [
                link.node for link in self.links.all()
                if link.connected and nodes[link.node].status != "down"
                and (link.edge_index < index or link.edge_error)
            ]

        try:
            async with asyncio.timeout(EDGE_CONFIRM_S):
                await self.links.until(lambda: not late())
        except TimeoutError:
            return late()
        return []

    async def _retired(self) -> None:
        """Wait for the old allocations to end; what takes longer goes on behind the deploy."""
        names = {change.service for change in self.deploy.changes}

        def all_ended(state: State) -> bool:
            return not any(
                a.status == "stopping" and a.service in names for a in state.allocations.values()
            )

        try:
            async with asyncio.timeout(RETIRE_S):
                await self.ledger.until(all_ended)
        except TimeoutError:
            await self._say(c.WarnDeploy(self.deploy_id, "old instances are still stopping"))

    # -- back ------------------------------------------------------------------------------

    async def _undo(self) -> None:
        """What is new stops (the retire loop sees to it); then the deploy is over."""
        failure = self.deploy.failure

        def all_ended(state: State) -> bool:
            return all(a.status in ENDED for a in state.of_deploy(self.deploy_id))

        clean = True
        try:
            async with asyncio.timeout(UNDO_S):
                await self.ledger.until(all_ended)
        except TimeoutError:
            clean = False
        if not clean:
            await self._say(c.EndRollback(self.deploy_id, "rollback_failed"))
        elif failure is not None and failure.cancelled:
            await self._say(c.EndRollback(self.deploy_id, "cancelled"))
        else:
            await self._say(c.EndRollback(self.deploy_id, "rolled_back"))


def how_it_ended(report: AllocReport) -> str:
    """`exited with code 3`, `was killed: out of memory`, `was killed by signal 9`."""
    if report.oom:
        return "was killed: out of memory"
    code = report.exit_code if report.exit_code is not None else -1
    if code > 128:
        return f"was killed by signal {code - 128}"
    return f"exited with code {code}"


def _first(failures: BaseExceptionGroup[DeployFailed]) -> DeployFailed:
    """The first failure of a group, however deep: the others are its company."""
    found: BaseException = failures
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, DeployFailed)
    return found
