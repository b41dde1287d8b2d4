"""The executor's front: what API and sources ask for, admitted, put in the log, and followed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from reconciler.errors import Conflict, MillError, NotFound
from reconciler.executor.admit import Admission, Admitted, DeployRunning, Repeated
from reconciler.executor.ledger import CommandRefused, Ledger
from reconciler.executor.links import Links
from reconciler.executor.requests import DeployRequest
from reconciler.fsm import commands as c
from reconciler.fsm.events import Pulling
from reconciler.fsm.records import Failure, Origin
from reconciler.plan.explain import PlanView

TURN_S = 600.0
"""How long scale, restart and rollback wait for the deploy that runs (design: Start)."""
TRIES = 3
"""Admissions of one request: the state may move between the plan and its proposal."""


@dataclass(frozen=True)
class Front:
    """Admits and starts deploys, on the leader."""

    ledger: Ledger
    admission: Admission
    links: Callable[[], Links | None]

    async def plan(self, request: DeployRequest) -> PlanView:
        """What `start` would do."""
        return await self.admission.plan(request)

    async def start(self, request: DeployRequest) -> str:
        """The deploy's id, once StartDeploy is in the log. A running deploy is a Conflict."""
        return await self._start(lambda: self.admission.admit(request), turn_s=0)

    async def scale(self, name: str, replicas: int, origin: Origin, key: str) -> str:
        """A deploy of the live spec with other replicas; waits its turn."""
        return await self._start(
            lambda: self.admission.scale(name, replicas, origin, key), turn_s=TURN_S)

    async def restart(self, name: str, origin: Origin, key: str) -> str:
        """A deploy of the live spec in new containers; waits its turn."""
        return await self._start(
            lambda: self.admission.restart(name, origin, key), turn_s=TURN_S)

    async def rollback(self, name: str, to: int | None, origin: Origin, key: str) -> str:
        """A deploy of an earlier revision; waits its turn."""
        return await self._start(
            lambda: self.admission.rollback(name, to, origin, key), turn_s=TURN_S)

    async def cancel(self, deploy_id: str) -> None:
        """Roll the running deploy back. Conflict where it is committed or over."""
        deploy = self.ledger.state.deploys.get(deploy_id)
        if deploy is None:
            raise NotFound(f"no deploy {deploy_id}", hint="list them with: mill deploys")
        if deploy.outcome != "running":
            raise Conflict(f"deploy {deploy_id} is {deploy.outcome} already")
        await self.ledger.propose(
            c.RollBackDeploy(deploy_id, Failure(reason="cancelled", cancelled=True)))

    async def progress(self, deploy_id: str) -> AsyncIterator[Pulling]:
        """Bytes of the pulls under way, while this node leads and the deploy pulls."""
        told: dict[tuple[str, str], int] = {}
        while True:
            links = self.links()
            deploy = self.ledger.state.deploys.get(deploy_id)
            if links is None or deploy is None or deploy.finished or deploy.pulls_done:
                return
            moved = links.moved
            for link in links.all():
                for (image, _), report in sorted(link.pulls.items()):
                    key = (link.node, image)
                    if report.state == "pulling" and told.get(key) != report.received_bytes:
                        told[key] = report.received_bytes
                        yield Pulling(image, link.node, report.received_bytes,
                                      report.total_bytes)
            try:
                async with asyncio.timeout(1.0):
                    await moved.wait()
            except TimeoutError:
                continue

    async def _start(
        self, admit: Callable[[], Awaitable[Admitted | Repeated]], turn_s: float
    ) -> str:
        loop = asyncio.get_running_loop()
        turn_ends = loop.time() + turn_s
        while True:
            try:
                return await self._admitted(admit)
            except DeployRunning as running:
                if loop.time() >= turn_ends or not await self._over(running.deploy, turn_ends):
                    raise

    async def _over(self, deploy_id: str, by: float) -> bool:
        """Wait for the deploy's end; False where it goes on past the loop's time `by`."""
        try:
            async with asyncio.timeout_at(by):
                await self.ledger.until(
                    lambda s: deploy_id not in s.deploys or s.deploys[deploy_id].finished)
        except TimeoutError:
            return False
        return True

    async def _admitted(self, admit: Callable[[], Awaitable[Admitted | Repeated]]) -> str:
        for attempt in range(TRIES):
            admitted = await admit()
            if isinstance(admitted, Repeated):
                return admitted.deploy
            try:
                # All in one go: the log keeps the order in which they are handed in.
                await asyncio.gather(*map(self.ledger.propose, admitted.stores))
                return f"d-{await self.ledger.propose(admitted.start)}"
            except CommandRefused as refused:
                # The next admission says what holds now: another deploy runs, this key has made
                # one, or it is planned anew.
                if attempt == TRIES - 1:
                    raise Conflict(refused.what, hint=refused.hint) from refused
        raise MillError("the deploy could not be started", hint="try again")
