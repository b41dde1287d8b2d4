"""A drain goes on whoever leads; and a node is removed once it is empty."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from reconciler.errors import NotFound
from reconciler.executor import drain, drains, leader, links
from reconciler.executor.drains import Nodes
from reconciler.executor.ledger import CommandRefused
from reconciler.fsm import commands as c
from tests.executor.drained import (
    drained,
    quiet,
    served,
    service,
    standing,
    until,
)
from tests.executor.world import world


@pytest.fixture(autouse=True)
def _nobody_else_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log of these worlds is led by node-1 until a test says otherwise: nothing to wait for."""
    monkeypatch.setattr(drain, "HAND_OVER_AGAIN_S", 0.02)
    monkeypatch.setattr(drains, "LEADER_S", 0.3)


async def test_a_leader_that_dies_after_any_entry_of_a_drain_is_followed_by_one_that_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "REDIAL_S", 0.02)
    monkeypatch.setattr(leader, "RETRY_S", 0.02)
    entries = await _interrupted(tmp_path / "x", None)
    room = asyncio.Semaphore(6)

    async def one(after: int) -> None:
        async with room:
            try:
                await _interrupted(tmp_path / str(after), after)
            except (AssertionError, TimeoutError) as error:
                raise AssertionError(f"dead after {after} of {entries}: {error}") from error

    async with asyncio.TaskGroup() as group:
        for after in range(entries + 1):
            group.create_task(one(after))


async def _interrupted(folder: Path, after: int | None) -> int:
    """A drain, with another leader after so many of its entries; how many there were."""
    folder.mkdir()
    async with world(folder) as w:
        await w.ended(await w.deploy(service("web", replicas=2), service("api", replicas=2)))
        await w.ledger.propose(c.DrainNode("node-2"))
        base = len(w.replica.entries) - 1
        if after is not None:
            w.replica.stop_after = base + 1 + after
            async with asyncio.timeout(60):
                while w.replica.leading and list(w.ledger.state.of_node("node-2")):
                    await asyncio.sleep(0.005)
            await w.unlead()
            w.lead()
        await until(w, lambda s: not list(s.of_node("node-2")))
        entries = len(w.replica.entries) - base
        await quiet(w)
        assert served(w, base) == {"web": 2, "api": 2}
        assert len([a for a in w.ledger.state.allocations.values() if a.replaces]) == 2
        return entries


async def test_a_node_is_removed_once_it_is_empty(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await standing(w)
        nodes = Nodes(w.ledger)
        with pytest.raises(CommandRefused) as refused:
            await nodes.remove("node-3")
        assert "mill drain node-3" in refused.value.hint
        assert (await drained(w, "node-3"))[-1].phase == "done"
        await nodes.remove("node-3")
        assert set(w.ledger.state.nodes) == {"node-1", "node-2"}
        assert w.links is not None
        async with asyncio.timeout(30):
            while w.links.get("node-3") is not None:
                await asyncio.sleep(0.01)
        await quiet(w)
        for name in ("node-3", "nobody"):
            with pytest.raises(NotFound):
                await nodes.undrain(name)
        with pytest.raises(NotFound):
            await drained(w, "node-3")


async def test_the_last_node_is_not_removed(tmp_path: Path) -> None:
    async with world(tmp_path, 1) as w:
        with pytest.raises(CommandRefused):
            await Nodes(w.ledger).remove("node-1")
