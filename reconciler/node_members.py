"""The log's members, as the executor's loops and the API speak of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

from reconciler.executor import membership as wanted
from reconciler.log import replica as log
from reconciler.log.replica import Replica

LOOK_S = 0.1


@dataclass(frozen=True)
class LogMembers:
    """Who takes part in the log, and how that changes."""

    replica: Replica

    @property
    def membership(self) -> log.Membership:
        """In effect at this node."""
        return self.replica.membership

    def progress(self) -> Mapping[str, log.Progress]:
        """What the leader knows of the others."""
        return self.replica.progress()

    async def change(self, change: wanted.Change) -> object:
        """One change; as `Replica.change`."""
        return await self.replica.change(_change(change))

    async def transfer(self, to: str | None = None) -> None:
        """Hand leadership over."""
        await self.replica.transfer(to)

    def told(self) -> tuple[tuple[log.Member, bool], ...]:
        """All members, and whether each votes: what a machine that joins is told."""
        now = self.replica.membership
        return tuple((member, now.votes(member.name)) for member in now.everyone)

    def votes(self, name: str) -> bool:
        """Whether it is a voter, as far as this node knows."""
        return self.replica.membership.votes(name)

    async def out(self, name: str) -> None:
        """Return once that node takes no part any more, as far as this node knows."""
        while self.replica.membership.get(name) is not None:  # noqa: ASYNC110  looked at for seconds
            await asyncio.sleep(LOOK_S)


def _change(change: wanted.Change) -> log.Change:
    match change:
        case wanted.AddLearner():
            return log.AddLearner(log.Member(change.name, change.host, change.port))
        case wanted.Promote():
            return log.Promote(change.name)
        case wanted.Demote():
            return log.Demote(change.name)
        case wanted.Remove():
            return log.Remove(change.name)
        case _:
            assert_never(change)
