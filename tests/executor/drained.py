"""A world whose nodes are emptied, and what may never happen meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from reconciler.edge.table import edge_table
from reconciler.executor.drains import Nodes
from reconciler.executor.ledger import StateMachine
from reconciler.executor.requests import DrainStep
from reconciler.fsm.records import ENDED, Allocation
from reconciler.fsm.state import State
from reconciler.language.spec import Health, ServiceSpec
from tests.executor.world import World
from tests.executor.world import service as quick_service

PLENTY_MS = 120_000


def service(name: str, tag: str = "ok", **changes: object) -> ServiceSpec:
    """One that has all the time it needs: the machine may be busy."""
    return quick_service(name, tag, **{"health": Health(
        kind="command", command=("check",), interval_ms=100, deadline_ms=100_000), **changes})


async def until(w: World, holds: Callable[[State], bool]) -> State:
    async with asyncio.timeout(60):
        return await w.ledger.until(holds)


async def drained(w: World, name: str, timeout_ms: int = PLENTY_MS) -> list[DrainStep]:
    return [step async for step in Nodes(w.ledger).drain(name, timeout_ms)]


async def standing(w: World) -> None:
    ended = await w.ended(await w.deploy(
        service("web", replicas=3), service("api", replicas=2), service("db")))
    assert ended.outcome == "deployed"


def live(state: State, name: str) -> list[Allocation]:
    return [a for a in state.of_service(name) if a.live]


def hold(w: World, name: str, *nodes: str) -> None:
    """On these nodes the service passes no probe."""
    for node in nodes:
        w.nodes[node].runtime.held.add(name)


def served(w: World, since: int) -> dict[str, int]:
    """The fewest endpoints that each service's traffic ever had, after every single entry."""
    machine, fewest = StateMachine(), dict[str, int]()
    for index, entry in enumerate(w.replica.entries, 1):
        machine.apply(index, entry)
        if index >= since:
            for cluster in edge_table(machine.state).clusters:
                serving = sum(not e.draining for e in cluster.endpoints)
                known = fewest.get(cluster.service, serving)
                fewest[cluster.service] = min(serving, known)
    return fewest


async def quiet(w: World) -> None:
    """Nothing is on its way any more, and what runs is what is live, each slot once."""

    def settled(state: State) -> bool:
        slots = sorted((a.service, a.slot) for a in state.allocations.values() if a.live)
        wanted = [(name, slot) for name in sorted(state.services)
                  for slot in range(state.live_spec(name).replicas)]  # type: ignore[union-attr]  # it is live
        return slots == wanted and all(
            (a.live and a.status == "healthy") or a.status in ENDED
            for a in state.allocations.values())

    async with asyncio.timeout(60):
        await w.ledger.until(settled)
        while set(w.containers()) != {a.id for a in w.ledger.state.allocations.values() if a.live}:
            await asyncio.sleep(0.01)
    assert settled(w.ledger.state)
