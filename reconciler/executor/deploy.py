"""A deploy, driven from its first fact to its terminal event: schedule, pull, start, health,
settle, commit, route, retire; or back.

Every step first asks the state whether it is done already. So the same code begins a deploy and
takes over one that another leader left in the middle: what the log says is never done twice, and
what runs on the nodes is found again through the agents' inventories.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog
from msgspec.structs import replace

from reconciler.executor.bring_up import BringUp
from reconciler.executor.ledger import CommandRefused
from reconciler.executor.pulling import Pulls
from reconciler.executor.stage import DeployFailed, Stage
from reconciler.fsm import commands as c
from reconciler.fsm.apply_deploys import changed
from reconciler.fsm.records import ENDED, Failure
from reconciler.fsm.state import State

log = structlog.get_logger("mill.deploy")

EDGE_CONFIRM_S = 5.0
"""An edge that is silent this long after a commit becomes a warning (contracts)."""
RETIRE_S = 35.0
"""`done` waits no longer than the drain (5 s) and 30 s for the old allocations to end."""
UNDO_S = 60.0
"""A rollback that cannot stop what it started within this is `rollback_failed`."""
INVENTORY_S = 5.0
"""How long a starting deploy waits for the agents it needs to say what they have."""


@dataclass(frozen=True)
class Pipeline:
    """One deploy on its way."""

    stage: Stage

    async def run(self) -> None:
        """Drive the deploy to its terminal event. Returns when it is in the log."""
        if self.stage.deploy.outcome == "running" and not self.stage.deploy.committed:
            await self._forward_or_back()
        if self.stage.deploy.outcome == "rolling_back":
            await self._undo()
        elif self.stage.deploy.outcome == "running":
            await self._finish()

    async def _forward_or_back(self) -> None:
        left_s = (self.stage.deploy.deadline_ms - self.stage.ledger.clock.wall_ms()) / 1000
        forward = asyncio.create_task(self._forward())
        ended = asyncio.create_task(self.stage.ledger.until(lambda _: self.stage.is_over))
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                await asyncio.wait({forward, ended}, return_when=asyncio.FIRST_COMPLETED)
            if forward.done():
                await forward
        except TimeoutError:
            # Images that did not come in time are no fault of the version.
            await self._fail(Failure(reason="the deploy's deadline passed",
                                     outside=not self.stage.deploy.pulls_done))
        except DeployFailed as error:
            await self._fail(error.failure)
        finally:
            for task in (forward, ended):
                task.cancel()
            await asyncio.gather(forward, ended, return_exceptions=True)

    async def _fail(self, failure: Failure) -> None:
        log.warning("deploy_failed", deploy=self.stage.deploy_id, reason=failure.reason,
                    service=failure.service, alloc=failure.alloc, node=failure.node)
        await self.stage.say(c.RollBackDeploy(self.stage.deploy_id, failure))

    # -- forward ---------------------------------------------------------------------------

    async def _forward(self) -> None:
        try:
            if self.stage.to_start() and not self.stage.deploy.pulls_begun:
                await self.stage.say(c.BeginPulls(self.stage.deploy_id))
            for message in self.stage.deploy.warnings[self.stage.deploy.warned :]:
                await self.stage.say(c.WarnDeploy(self.stage.deploy_id, message))
            if self.stage.to_start():
                await self._schedule()
                await self._connected()
                await Pulls(self.stage).run()
            await BringUp(self.stage).run()
        except BaseExceptionGroup as group:
            # Not `except*`: until Python 3.11.4 what is raised inside one comes out as a group.
            failures, others = group.split(DeployFailed)
            if failures is None or others is not None:
                raise
            raise _first(failures) from None
        await self._commit()

    async def _schedule(self) -> None:
        missing = [
            c.ScheduleAlloc(
                alloc=self.stage.new_id(change.service), service=change.service,
                node=change.slots[number].node, slot=number, deploy=self.stage.deploy_id,
            )
            for change, number in self.stage.to_start()
            if self.stage.alloc_of(change.service, number) is None
        ]
        results = await asyncio.gather(*map(self.stage.say, missing))
        for command, placed in zip(missing, results, strict=True):
            if not placed and not self.stage.is_over and not await self._elsewhere(command):
                raise DeployFailed(Failure(
                    reason=f"{command.service} could not be placed on {command.node}",
                    service=command.service, node=command.node, outside=True,
                ))

    async def _elsewhere(self, refused: c.ScheduleAlloc) -> bool:
        """The node went down since the plan: the next best one takes what it was to take."""
        change = self.stage.deploy.change(refused.service)
        assert change is not None, "it was scheduled for a change"
        node = self.stage.elsewhere(self.stage.ledger.state, self.stage.spec(change),
                                    change.digest, refused.node)
        return node is not None and await self.stage.say(replace(refused, node=node))

    async def _connected(self) -> None:
        """The agents' inventories say what is there already, so wait for them a moment."""
        nodes = {a.node for a in self.stage.ledger.state.of_deploy(self.stage.deploy_id)}

        def all_known() -> bool:
            links = [self.stage.links.get(node) for node in nodes]
            return all(link is not None and link.connected for link in links)

        try:
            async with asyncio.timeout(INVENTORY_S):
                await self.stage.links.until(all_known)
        except TimeoutError:
            log.info("agents_not_all_connected", deploy=self.stage.deploy_id)

    # -- commit, route, retire -------------------------------------------------------------

    async def _commit(self) -> None:
        """One entry flips everything. Refused: something fell in the last moment."""
        if not self.stage.deploy.changes or self.stage.deploy.committed:
            return
        try:
            await self.stage.ledger.propose(c.CommitDeploy(self.stage.deploy_id))
        except CommandRefused as refused:
            if self.stage.is_over:
                return
            # What is new was watched until a moment ago: what is kept fell, or a node did.
            raise DeployFailed(Failure(reason=refused.what, outside=True)) from refused

    async def _finish(self) -> None:
        """After the commit there is only forward."""
        if changed(self.stage.deploy):
            if not self.stage.deploy.routed:
                for node in await self._unconfirmed():
                    await self.stage.say(c.WarnDeploy(
                        self.stage.deploy_id, f"the edge of {node} has not confirmed the new routes"
                    ))
                await self.stage.say(c.RouteDeploy(self.stage.deploy_id))
            await self._retired()
        await self.stage.say(c.FinishDeploy(self.stage.deploy_id))

    async def _unconfirmed(self) -> list[str]:
        """Wait for every live edge to serve the commit; the names of those that do not."""
        index = self.stage.ledger.state.index

        def late() -> list[str]:
            nodes = self.stage.ledger.state.nodes
            return [
                link.node for link in self.stage.links.all()
                if link.connected and link.node in nodes and nodes[link.node].status != "down"
                and (link.edge_index < index or link.edge_error)
            ]

        try:
            async with asyncio.timeout(EDGE_CONFIRM_S):
                await self.stage.links.until(lambda: not late())
        except TimeoutError:
            return late()
        return []

    async def _retired(self) -> None:
        """Wait for the old allocations to end; what takes longer goes on behind the deploy."""
        names = {change.service for change in self.stage.deploy.changes}

        def all_ended(state: State) -> bool:
            return not any(
                a.status == "stopping" and a.service in names for a in state.allocations.values()
            )

        try:
            async with asyncio.timeout(RETIRE_S):
                await self.stage.ledger.until(all_ended)
        except TimeoutError:
            await self.stage.say(
                c.WarnDeploy(self.stage.deploy_id, "old instances are still stopping"))

    # -- back ------------------------------------------------------------------------------

    async def _undo(self) -> None:
        """What is new stops (the retire loop sees to it); then the deploy is over."""
        failure = self.stage.deploy.failure

        def all_ended(state: State) -> bool:
            return all(a.status in ENDED for a in state.of_deploy(self.stage.deploy_id))

        clean = True
        try:
            async with asyncio.timeout(UNDO_S + self._stop_timeout_s()):
                await self.stage.ledger.until(all_ended)
        except TimeoutError:
            clean = False
        if not clean:
            await self.stage.say(c.EndRollback(self.stage.deploy_id, "rollback_failed"))
        elif failure is not None and failure.cancelled:
            await self.stage.say(c.EndRollback(self.stage.deploy_id, "cancelled"))
        else:
            await self.stage.say(c.EndRollback(self.stage.deploy_id, "rolled_back"))


    def _stop_timeout_s(self) -> float:
        """The longest time that what was started may take to stop, as its spec allows."""
        return max((
            self.stage.spec(change).stop_timeout_ms / 1000
            for change in self.stage.deploy.changes if change.action in ("create", "update")
        ), default=0.0)


def _first(failures: BaseExceptionGroup[DeployFailed]) -> DeployFailed:
    """The first failure of a group, however deep: the others are its company."""
    found: BaseException = failures
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, DeployFailed)
    return found
