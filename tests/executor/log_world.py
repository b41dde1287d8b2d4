"""Real logs over TLS, each with its ledger, and the leader's membership loop where it leads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from reconciler.clock import RealClock
from reconciler.executor.drain import Drain
from reconciler.executor.ledger import Ledger, StateMachine
from reconciler.executor.links import Credentials, Links
from reconciler.executor.membership import Membership
from reconciler.fsm import commands as c
from reconciler.log.errors import NotLeader
from reconciler.log.replica import Replica
from reconciler.log.settings import Member, Settings
from reconciler.node_members import LogMembers
from tests.log.certificates import Authority
from tests.log.cluster import free_members

DEADLINE_S = 60.0


@dataclass
class LogNode:
    """One node's log, and the loop that it runs while it leads."""

    replica: Replica
    ledger: Ledger
    members: LogMembers
    _leading: asyncio.Task[None] | None = None

    async def up(self) -> None:
        self.replica.on_applied(self.ledger.woken)
        self.replica.on_leadership(self._led)
        await self.replica.start()
        if self.replica.is_leader:
            self._led(True, self.replica.term)

    async def down(self) -> None:
        await self.replica.stop()
        self._led(False, 0)

    def _led(self, leading: bool, term: int) -> None:
        if self._leading is not None:
            self._leading.cancel()
            self._leading = None
        if leading:
            self._leading = asyncio.create_task(self._lead(self.replica.leader or ""))

    async def _lead(self, me: str) -> None:
        """What moves the log's members and its leadership; there are no agents here."""
        links = Links(self.ledger, me, Credentials(b"", b"", b""), self.ledger.clock)
        drain = Drain(self.ledger, links, str, self.replica.transfer)
        async with asyncio.TaskGroup() as group:
            group.create_task(Membership(self.ledger, self.members, me).run())
            group.create_task(drain.run())


@dataclass
class LogWorld:
    """Up to `most` nodes; the first `founders` of them are the founding voters."""

    folder: Path
    most: int
    founders: int = 1
    nodes: dict[str, LogNode] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.authority = Authority(self.folder)
        self.addresses: dict[str, Member] = {m.name: m for m in free_members(self.most)}

    async def start(self, *names: str) -> None:
        founders = tuple(self.addresses.values())[: self.founders]
        for name in names:
            cert, key = self.authority.issue(name)
            machine = StateMachine()
            replica = Replica(Settings(self.folder / name, self.addresses[name], founders,
                                       self.authority.file, cert, key), machine)
            ledger = Ledger(replica, machine, RealClock())
            self.nodes[name] = LogNode(replica, ledger, LogMembers(replica))
            await self.nodes[name].up()

    async def stop(self, *names: str) -> None:
        for name in names or tuple(self.nodes):
            await self.nodes.pop(name).down()


    async def until(self, fact: Callable[[], object], what: str) -> None:
        """Wait for a fact of this process."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not fact():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            now = {n: str(node.replica.membership) for n, node in self.nodes.items()}
            raise AssertionError(f"never happened: {what}; {now}") from None

    def leading(self) -> LogNode | None:
        return next((n for n in self.nodes.values() if n.replica.is_leader), None)

    async def leader(self) -> LogNode:
        await self.until(self.leading, "a leader")
        leader = self.leading()
        assert leader is not None
        return leader

    async def propose(self, command: c.AnyCommand) -> None:
        """To whoever leads, again where it was surely not written."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                with contextlib.suppress(NotLeader):
                    await (await self.leader()).ledger.propose(command)
                    return

    async def found(self) -> None:
        """The founders come into the state one by one, and the cluster last."""
        for number in range(1, self.founders + 1):
            await self.register(number)
        await self.propose(c.InitCluster("test", "t", "0" * 64))

    async def register(self, number: int, **fields: object) -> None:
        member = self.addresses[f"node-{number}"]
        await self.propose(c.RegisterNode(**{  # type: ignore[arg-type]  # the test names the fields
            "name": member.name, "number": number, "api": f"127.0.0.1:{number}", "agent": "a",
            "cpu_milli": 4_000, "memory_bytes": 8_000_000_000,
            "log": f"{member.host}:{member.port}", **fields}))

    def voters(self) -> list[str]:
        """As every running node knows them, if all agree; else none."""
        seen = {tuple(sorted(m.name for m in node.replica.membership.voters))
                for node in self.nodes.values()}
        return list(seen.pop()) if len(seen) == 1 else []

    def learners(self) -> list[str]:
        seen = {tuple(sorted(m.name for m in node.replica.membership.learners))
                for node in self.nodes.values()}
        return list(seen.pop()) if len(seen) == 1 else []

    async def until_members(self, voters: list[str], learners: list[str]) -> None:
        await self.until(lambda: (self.voters(), self.learners()) == (voters, learners),
                         f"voters {voters} and learners {learners}")


@contextlib.asynccontextmanager
async def log_world(folder: Path, most: int, founders: int = 1) -> AsyncIterator[LogWorld]:
    """A founded one, and gone at the end."""
    world = LogWorld(folder, most, founders)
    try:
        await world.start(*(f"node-{n}" for n in range(1, founders + 1)))
        await world.found()
        yield world
    finally:
        await world.stop()
