"""The API's narrow interfaces, filled with this node's parts."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from reconciler.api.services import Ask, LogLine
from reconciler.errors import NotFound
from reconciler.executor.agent.orders import LogRequest
from reconciler.executor.front import Front
from reconciler.executor.ledger import Ledger
from reconciler.executor.links import Links, LogReader
from reconciler.executor.requests import DeployRequest
from reconciler.fsm import commands as c
from reconciler.fsm.events import Pulling
from reconciler.fsm.records import Allocation, Origin, OriginKind, Source
from reconciler.git.source import Sources
from reconciler.plan.explain import PlanView


def _origin(kind: OriginKind, ask: Ask) -> Origin:
    return Origin(kind=kind, token=ask.token)


@dataclass(frozen=True)
class Deploys:
    """The executor's front, asked by a token."""

    front: Front

    async def plan(self, request: DeployRequest) -> PlanView:
        """What `start` would do."""
        return await self.front.plan(request)

    async def start(self, request: DeployRequest) -> str:
        """The deploy's id."""
        return await self.front.start(request)

    async def cancel(self, deploy_id: str) -> None:
        """Roll the running deploy back."""
        await self.front.cancel(deploy_id)

    async def scale(self, name: str, replicas: int, ask: Ask) -> str:
        """A deploy of the live spec with other replicas."""
        return await self.front.scale(name, replicas, _origin("scale", ask), ask.key)

    async def restart(self, name: str, ask: Ask) -> str:
        """A deploy of the live spec in new containers."""
        return await self.front.restart(name, _origin("restart", ask), ask.key)

    async def rollback(self, name: str, to: int | None, ask: Ask) -> str:
        """A deploy of an earlier revision."""
        return await self.front.rollback(name, to, _origin("rollback", ask), ask.key)

    def progress(self, deploy_id: str) -> AsyncIterator[Pulling]:
        """Bytes of the pulls under way."""
        return self.front.progress(deploy_id)


@dataclass(frozen=True)
class Logs:
    """Lines of any allocation, from its node's agent."""

    reader: LogReader

    async def follow(self, alloc: Allocation, tail: int, follow: bool) -> AsyncIterator[LogLine]:
        """The last lines, then as they come."""
        request = LogRequest(alloc=alloc.id, tail=tail, follow=follow)
        async with contextlib.aclosing(self.reader.follow(alloc.node, request)) as lines:
            async for line in lines:
                yield LogLine(line.ts, alloc.id, line.stream, line.line)


@dataclass(frozen=True)
class GitSources:
    """Sources in the log, and the loop that follows them."""

    ledger: Ledger
    front: Front
    loop: Callable[[], Sources | None]

    async def add(self, source: Source) -> None:
        """Follow it from now on."""
        await self.ledger.propose(c.PutSource(source))

    async def sync(self, name: str, allow_empty: bool, retry: bool) -> None:
        """Look now."""
        self._known(name)
        loop = self.loop()
        if loop is not None:
            loop.sync_now(name, allow_empty=allow_empty)

    async def remove(self, name: str, prune: bool) -> None:
        """Follow it no more; with `prune` its services go first, as one deploy."""
        self._known(name)
        if prune:
            deploy = await self.front.start(DeployRequest(
                files={}, prune=True, owner=name, origin=Origin(kind="git", source=name)))
            await self.ledger.until(
                lambda s: deploy not in s.deploys or s.deploys[deploy].finished)
        await self.ledger.propose(c.RemoveSource(name))

    def next_poll_ms(self, name: str) -> int | None:
        """When it is looked at next, in ms since the epoch."""
        loop = self.loop()
        return loop.next_poll_ms(name) if loop else None

    def _known(self, name: str) -> None:
        if name not in self.ledger.state.sources:
            raise NotFound(f"no source {name}", hint="list them with: mill git list")


@dataclass(frozen=True)
class NodesView:
    """What the leader's links see, and what this node, `me`, knows of its own log."""

    links: Callable[[], Links | None]
    me: str
    closed: Callable[[], str]
    votes: Callable[[str], bool]

    def last_seen(self, node: str) -> int | None:
        """The last heartbeat, in ms since the epoch."""
        links = self.links()
        link = links.get(node) if links else None
        return link.last_seen_ms if link and link.heard else None

    def edge_error(self, node: str) -> str:
        """Why its edge does not take the routes."""
        links = self.links()
        link = links.get(node) if links else None
        if link is None or not link.connected:
            return ""  # that the node is away is said elsewhere
        return link.edge_error or ("" if link.edge_index else "it serves nothing yet")

    def voter(self, node: str) -> bool:
        """Whether it is a voter of the log."""
        return self.votes(node)

    def log_error(self, node: str) -> str:
        """Why its log is closed; of another node only the leader knows."""
        if node == self.me:
            return self.closed()
        links = self.links()
        link = links.get(node) if links else None
        return link.log_error if link and link.connected else ""
