"""The pull stage: every image on every node that needs it, in parallel, each once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from reconciler.executor.agent.orders import PullReport
from reconciler.executor.stage import DeployFailed, Stage
from reconciler.executor.starting import pull_order
from reconciler.fsm import commands as c
from reconciler.fsm.records import ENDED, Allocation, Failure

PULL_TRIES = 4
PULL_BACKOFF_S = (0.5, 2.0, 5.0)


@dataclass(frozen=True)
class Pulls:
    """The images of one deploy."""

    stage: Stage

    async def run(self) -> None:
        """Until all are there. Raises DeployFailed (in a group) where one cannot be had."""
        wanted: dict[tuple[str, str, str], Allocation] = {}
        for alloc in self.stage.ledger.state.of_deploy(self.stage.deploy_id):
            if alloc.status not in ENDED:
                wanted.setdefault((alloc.image, alloc.node, alloc.digest), alloc)
        async with asyncio.TaskGroup() as group:
            for (image, node, _), alloc in sorted(wanted.items()):
                if (image, node) not in self.stage.deploy.pulled:
                    group.create_task(self.one(alloc))
        if not self.stage.deploy.pulls_done:
            await self.stage.say(c.FinishPulls(self.stage.deploy_id))

    async def one(self, alloc: Allocation) -> None:
        """The image of one allocation on its node; tried again unless the registry said no."""
        key = (alloc.image, alloc.digest)
        link = self.stage.links.get(alloc.node)
        if link is not None and link.connected and key in link.images and self._kept(alloc):
            await self.stage.say(
                c.RecordPull(self.stage.deploy_id, alloc.image, alloc.node, cached=True))
            return
        for attempt in range(PULL_TRIES):
            report = await self._pulled(alloc)
            if report is None:
                return  # the node is lost: its allocations are placed elsewhere and pull there
            if report.state == "done":
                await self.stage.say(
                    c.RecordPull(self.stage.deploy_id, alloc.image, alloc.node, report.cached)
                )
                return
            if report.final or attempt == PULL_TRIES - 1:
                raise DeployFailed(Failure(
                    reason=f"cannot pull {alloc.image}: {report.error}",
                    service=alloc.service, alloc=alloc.id, node=alloc.node,
                    outside=not report.final,
                ))
            await asyncio.sleep(PULL_BACKOFF_S[attempt])

    def _kept(self, alloc: Allocation) -> bool:
        """The image was needed before this deploy, so that no node has tidied it away since its
        inventory."""
        state = self.stage.ledger.state
        return any(
            revision.digest == alloc.digest
            for service in state.services.values() for revision in service.revisions
        ) or any(
            other.digest == alloc.digest and other.deploy != self.stage.deploy_id
            for other in state.allocations.values()
        )

    async def _pulled(self, alloc: Allocation) -> PullReport | None:
        """Order the image and wait for how it went; None where the node is lost meanwhile."""
        key = (alloc.image, alloc.digest)
        sent_to: object = None
        while True:
            moved = self.stage.links.moved
            if self.stage.alloc(alloc.id).status in ENDED:
                return None
            link = self.stage.links.get(alloc.node)
            if link is not None and link.connected:
                report = link.pulls.get(key)
                if sent_to is link.orders and report and report.state != "pulling":
                    return report
                if sent_to is not link.orders:
                    sent_to = link.orders  # another stream: what the old one was told is gone
                    link.pulls.pop(key, None)
                    link.send(pull_order(self.stage.ledger.state, alloc, self.stage.ledger.term))
            await moved.wait()
