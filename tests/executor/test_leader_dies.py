"""A leader that dies after any single entry is followed by one that ends what it began.

Every index of every kind of deploy is tried; the worlds of one kind live side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from reconciler.errors import MillError, Unavailable
from reconciler.executor import leader, links
from reconciler.fsm import commands as c
from reconciler.fsm.records import ENDED, Deploy, Failure
from reconciler.language.spec import Health, ServiceSpec
from tests.executor.world import World, world
from tests.executor.world import service as quick_service

AT_ONCE = 8
"""Worlds that live at the same time; each has three agents behind TLS."""

Step = Callable[[World], Awaitable[str]]


@dataclass(frozen=True)
class Story:
    """A deploy over what stands: `before` brings that about, `deploy` starts the one that is
    interrupted; `cancelled`: a person cancels it as soon as something runs."""

    before: Step
    deploy: Step
    outcome: str
    cancelled: bool = False


def service(name: str, tag: str = "ok", **changes: object) -> ServiceSpec:
    """One that has all the time it needs: the machine may be busy with other worlds."""
    return quick_service(name, tag, health=Health(
        kind="command", command=("check",), interval_ms=100, deadline_ms=100_000), **changes)


async def _standing(w: World) -> str:
    deploy = await w.deploy(service("web", replicas=2), service("api"), service("db", replicas=2))
    await w.ended(deploy)
    return deploy


async def _nothing(_w: World) -> str:
    return ""


STORIES = {
    "first": Story(_nothing, lambda w: w.deploy(
        service("web", replicas=2, depends_on=("api",)), service("api")), "deployed"),
    "update": Story(_standing, lambda w: w.deploy(
        service("web", replicas=2, user="7"), service("api", user="7")), "deployed"),
    "removal": Story(_standing, lambda w: w.deploy(
        service("api", user="7"), remove=("web",)), "deployed"),
    "up": Story(_standing, lambda w: w.deploy(service("web", replicas=4), scale=True), "deployed"),
    "down": Story(_standing, lambda w: w.deploy(service("web", replicas=1), scale=True),
                  "deployed"),
    "zero": Story(_standing, lambda w: w.deploy(service("web", replicas=0)), "deployed"),
    "broken": Story(_standing, lambda w: w.deploy(
        service("web", "exits", replicas=2, user="7"), service("api", user="7")), "rolled_back"),
    "cancel": Story(_standing, lambda w: w.deploy(
        service("web", "sick", replicas=2), service("api", user="7")), "cancelled",
        cancelled=True),
}


@pytest.mark.parametrize("name", STORIES)
async def test_a_leader_that_dies_after_any_entry_is_followed_by_one_that_ends_the_deploy(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "REDIAL_S", 0.02)
    monkeypatch.setattr(leader, "RETRY_S", 0.02)
    story = STORIES[name]
    room = asyncio.Semaphore(AT_ONCE)
    entries = await _told(tmp_path / "x", story, None)

    async def one(after: int) -> None:
        async with room:
            try:
                await _told(tmp_path / str(after), story, after)
            except (AssertionError, TimeoutError) as error:
                raise AssertionError(f"{name}, dead after {after} of {entries}: {error}") from error

    async with asyncio.TaskGroup() as group:
        for after in range(entries + 1):
            group.create_task(one(after))


async def _told(folder: Path, story: Story, after: int | None) -> int:
    """Tell the story, with another leader after so many entries; how many there were."""
    folder.mkdir()
    async with world(folder) as w:
        await story.before(w)
        services = w.ledger.state.services
        started = _starts(w)
        live = {a.id for a in w.ledger.state.allocations.values() if a.live}
        deploy = await story.deploy(w)
        base = len(w.replica.entries)
        if after is not None:
            w.replica.stop_after = base + after
        cancelling = asyncio.create_task(_cancel(w, deploy)) if story.cancelled else None
        if after is not None:
            await _dead_or_done(w, deploy)
            await w.unlead()
            w.lead()
        ended = await w.ended(deploy, within_s=120)
        if cancelling is not None:
            async with asyncio.timeout(60):
                await cancelling
        entries = len(w.replica.entries) - base
        await _quiet(w)
        assert ended.outcome == story.outcome, ended
        if ended.outcome == "deployed":
            assert _is_whole(w, ended)
        else:
            assert w.ledger.state.services == services
            assert {a.id for a in w.ledger.state.allocations.values() if a.live} == live
        _stream_is_sound(w, deploy)
        kept = live & set(w.containers())
        assert all(started[alloc] == _starts(w)[alloc] for alloc in kept), "it was restarted"
        assert {a for a in live if a.startswith("db")} <= kept
        return entries


async def _cancel(w: World, deploy: str) -> None:
    """As a person does: again, where no leader took it."""
    await w.ledger.until(lambda s: s.deploys[deploy].finished or any(
        a.deploy == deploy and a.status == "running" and a.service == "web"
        for a in s.allocations.values()))
    while not w.ledger.state.deploys[deploy].finished:
        try:
            await w.ledger.propose(
                c.RollBackDeploy(deploy, Failure(reason="cancelled", cancelled=True)))
        except Unavailable:
            await asyncio.sleep(0.02)
        except MillError:
            return


async def _dead_or_done(w: World, deploy: str) -> None:
    async with asyncio.timeout(60):
        while w.replica.leading and not w.ledger.state.deploys[deploy].finished:
            await asyncio.sleep(0.005)


async def _quiet(w: World) -> None:
    """Nothing is on its way any more, and what runs is what is live."""
    async with asyncio.timeout(60):
        await w.ledger.until(lambda s: all(
            (a.live and a.status == "healthy") or a.status in ENDED
            for a in s.allocations.values()))
        while set(w.containers()) != {a.id for a in w.ledger.state.allocations.values() if a.live}:
            await asyncio.sleep(0.01)


def _is_whole(w: World, deploy: Deploy) -> bool:
    state = w.ledger.state
    for change in deploy.changes:
        if change.action == "remove":
            assert change.service not in state.services
            continue
        assert state.services[change.service].live == change.to_revision
        live = sorted(a.slot for a in state.of_service(change.service) if a.live)
        assert live == list(range(len(change.slots)))
    return True


def _stream_is_sound(w: World, deploy: str) -> None:
    events = w.ledger.state.deploy_events[deploy]
    ids = [event.index for event in events]
    assert ids == sorted(set(ids))
    assert [e.kind != "progress" for e in events] == [False] * (len(events) - 1) + [True]


def _starts(w: World) -> Counter[str]:
    with contextlib.suppress(KeyError):
        return Counter(a for node in w.nodes.values() for a in node.runtime.started)
    return Counter()
