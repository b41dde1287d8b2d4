"""Leadership comes and goes: what one leader began, the next one ends, once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from reconciler.git.poll import Poller
from tests.git.following import DEADLINE_S, World, leading, rise
from tests.git.git_fixtures import Repository, git


@pytest.mark.parametrize("text", ["ok", "ill"])
async def test_the_next_leader_ends_what_the_last_one_began(
    idle: World, repository: Repository, poller: Poller, text: str
) -> None:
    sha = repository.commit({"web.mill": "slow", "api.mill": text})
    async with leading(idle):
        await idle.add(repository.url)
        await idle.source("deploying", sha)
    idle.executor.finish.set()
    await idle.until(lambda s: not s.active_deploy)
    assert idle.ledger.state.sources["app"].status == "deploying"
    heir = rise(idle.ledger, idle.replica, idle.executor, poller)
    async with leading(heir):
        source = await heir.source("failing" if text == "ill" else "synced", sha)
        await heir.polls(2)
    assert source.quarantined == ((sha,) if text == "ill" else ())
    assert heir.executor.asked == [sha]


async def test_the_next_leader_waits_for_a_deploy_that_still_runs(
    idle: World, repository: Repository, poller: Poller
) -> None:
    sha = repository.commit({"web.mill": "slow"})
    async with leading(idle):
        await idle.add(repository.url)
        await idle.source("deploying", sha)
    heir = rise(idle.ledger, idle.replica, idle.executor, poller)
    async with leading(heir):
        idle.executor.finish.set()
        await heir.source("synced", sha)
    assert heir.executor.asked == [sha]


async def test_the_next_leader_writes_nothing_where_nothing_changed(
    idle: World, repository: Repository, poller: Poller, tmp_path: Path
) -> None:
    texts = {"good": "ok", "bad": "ill", "odd": "invalid", "full": "busy"}
    for name, text in texts.items():
        made = Repository(tmp_path / name)
        made.commit({f"{name}.mill": text})
    statuses = {"good": "synced", "bad": "failing", "odd": "failing", "full": "waiting"}
    async with leading(idle):
        for name in texts:
            await idle.add(str(tmp_path / name), name)
        for name, status in statuses.items():
            await idle.source(status, git(tmp_path / name, "rev-parse", "HEAD"), name)
    before = idle.replica.index
    heir = rise(idle.ledger, idle.replica, idle.executor, poller)
    async with leading(heir):
        async with asyncio.timeout(DEADLINE_S):
            while not all(heir.sources.next_poll_ms(name) for name in texts):
                await asyncio.sleep(0.01)
    assert heir.replica.index == before


async def test_a_node_that_does_not_lead_does_not_look(
    world: World, repository: Repository
) -> None:
    world.replica.is_leader = False
    repository.commit({"web.mill": "ok"})
    await world.add(repository.url)
    await world.polls(3)
    assert world.executor.asked == []
    world.replica.is_leader = True
    await world.source("synced")
