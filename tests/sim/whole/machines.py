"""Those who run the machines: they join some, drain them, take them back, and remove them.

What is never done is what mill does not promise to survive: a machine is lost for good only
while the log's members are what they should be, and another is left to run things.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial

from reconciler.errors import Conflict
from reconciler.fsm import commands as c
from reconciler.fsm.records import Token
from tests.sim.whole.people import People, Wish
from tests.sim.whole.process import Process, where
from tests.sim.whole.world import WholeNode, WholeWorld, member

MAX_JOINS = 3
DRAIN_MS = 15_000
TOKEN_MS = 3_600_000


@dataclass
class Machines:
    """One wish at a time."""

    world: WholeWorld
    people: People
    every_s: float
    _next_s: float = 1_008.0
    _joined: int = 0
    _wish: Wish | None = None

    def step(self) -> None:
        """Now and then."""
        now_s, rng = self.world.now_s, self.world.rng
        if now_s < self._next_s or self._wish in self.people.wishes:
            return
        self._next_s = now_s + rng.uniform(0.2, 1.8) * self.every_s
        self._wish = self._new_wish()
        if self._wish is not None:
            self.people.wishes.append(self._wish)

    def _new_wish(self) -> Wish | None:
        rng, nodes = self.world.rng, self.world.promises.newest.nodes
        serving = [node.name for node in nodes.values() if not node.draining]
        draining = [node.name for node in nodes.values() if node.draining]
        down = [node.name for node in nodes.values() if node.status == "down"]
        kind = rng.choices(("join", "drain", "undrain", "leave", "remove"), (4, 3, 3, 2, 2))[0]
        if kind == "join" and self._joined < MAX_JOINS and nodes:
            self._joined += 1
            machine = self.world.new_machine()
            return Wish(kind, "", partial(self._join, machine), persists=True)
        if kind == "undrain" and draining:
            return self._asking(kind, rng.choice(draining))
        if kind == "drain" and len(serving) > 1:
            return self._asking(kind, rng.choice(serving))
        if kind == "leave" and len(serving) > 1:
            return self._asking(kind, rng.choice(list(nodes)))
        if kind == "remove" and down and len(serving) > 1:
            return self._asking(kind, rng.choice(down))
        return None

    def _asking(self, kind: str, name: str) -> Wish:
        ask = {"drain": self._drain, "undrain": self._undrain, "leave": self._leave,
               "remove": self._remove}[kind]
        return Wish(kind, "", partial(ask, name))

    async def _join(self, machine: WholeNode, process: Process) -> str:
        """As `executor.joining`, but for the certificate."""
        me = member(int(machine.name[1:]))
        token, ledger = f"join-{me.name}", process.ledger
        if token not in (await ledger.read()).tokens:
            await ledger.propose(c.CreateToken(Token(
                id=token, sha256=hashlib.sha256(token.encode()).hexdigest(), role="join", uses=1,
                expires_ms=ledger.clock.wall_ms() + TOKEN_MS)))
        key = hashlib.sha256(me.name.encode()).hexdigest()
        await ledger.propose(c.JoinNode(token=token, key_sha256=key, name=me.name, **where(me)))
        self.world.arrive(machine, tuple(
            each for each, _ in process.members.told() if each.name != me.name))
        return ""

    async def _drain(self, name: str, process: Process) -> str:
        self._check_others(name)
        phase = ""
        async for step in process.nodes.drain(name, DRAIN_MS):
            phase = step.phase
        if phase == "done" and any(process.ledger.state.of_node(name)):
            node = process.ledger.state.nodes.get(name)
            if node is None or node.draining:
                self.world.fail(f"{name} is drained, and not empty")
        return phase

    async def _undrain(self, name: str, process: Process) -> str:
        await process.nodes.undrain(name)
        return ""

    async def _leave(self, name: str, process: Process) -> str:
        if await self._drain(name, process) != "done":
            raise Conflict(f"{name} is not empty")
        return await self._remove(name, process)

    async def _remove(self, name: str, process: Process) -> str:
        self._check_others(name)
        if not self.world.settled:
            raise Conflict("one at a time")
        await process.nodes.remove(name)
        return ""

    def _check_others(self, name: str) -> None:
        nodes = self.world.promises.newest.nodes.values()
        if not any(node.name != name and not node.draining for node in nodes):
            raise Conflict("somebody has to run things")
