"""One leader that follows sources in a small cluster, and what a test asks of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from msgspec.structs import replace

from reconciler.executor.ledger import Ledger
from reconciler.fsm import commands as c
from reconciler.fsm.records import Source
from reconciler.fsm.state import State
from reconciler.git.bring import Bring
from reconciler.git.poll import Poller
from reconciler.git.source import Sources
from tests.git.small_cluster import OneReplica, SmallExecutor

DEADLINE_S = 60
SECRETS = {"forge": "ada:s3cret"}


class World:
    """One leader that follows sources, and what one asks of it."""

    def __init__(self, ledger: Ledger, replica: OneReplica, executor: SmallExecutor,
                 sources: Sources) -> None:
        self.ledger = ledger
        self.replica = replica
        self.executor = executor
        self.sources = sources

    async def add(self, url: str, name: str = "app", **fields: object) -> None:
        source = Source(name=name, url=url, poll_ms=50)
        await self.ledger.propose(c.PutSource(replace(source, **fields)))

    async def until(self, holds: Callable[[State], object]) -> State:
        async with asyncio.timeout(DEADLINE_S):
            return await self.ledger.until(lambda state: bool(holds(state)))

    async def source(self, status: str, head: str = "", name: str = "app") -> Source:
        """The source, once it has that status (and that head)."""
        state = await self.until(lambda s: s.sources[name].status == status
                                 and head in ("", s.sources[name].head))
        return state.sources[name]

    async def polls(self, count: int) -> None:
        """Wait until so many further polls have been."""
        seen = 0
        last = self.sources.next_poll_ms("app")
        async with asyncio.timeout(DEADLINE_S):
            while seen < count:
                await asyncio.sleep(0.01)
                if (now := self.sources.next_poll_ms("app")) != last:
                    seen, last = seen + 1, now


@asynccontextmanager
async def leading(world: World) -> AsyncIterator[None]:
    """Run the loop; cancelled at the end, as when leadership is lost."""
    running = asyncio.create_task(world.sources.run())
    try:
        yield
    finally:
        running.cancel()
        result = (await asyncio.gather(running, return_exceptions=True))[0]
        assert isinstance(result, asyncio.CancelledError), result


def rise(ledger: Ledger, replica: OneReplica, executor: SmallExecutor, poller: Poller) -> World:
    """A leader with nothing in mind."""
    return World(ledger, replica, executor,
                 Sources(ledger, poller.look, Bring(ledger, executor.start, executor.count),
                         SECRETS.get))
