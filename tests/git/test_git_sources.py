"""The leader's loop over real repositories, read by real children, recorded in a real log."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from reconciler.errors import Conflict, NotFound
from reconciler.executor.ledger import CommandRefused
from reconciler.fsm import commands as c
from reconciler.fsm.codec import Entry, encode_entry
from reconciler.fsm.records import Source
from tests.git.following import DEADLINE_S, SECRETS, World, leading
from tests.git.git_fixtures import GitServer, Repository, git
from tests.git.small_cluster import runs


async def test_commits_are_followed_and_pruned(world: World, repository: Repository) -> None:
    first = repository.commit({"web.mill": "ok", "api.mill": "ok"}, "begin")
    await world.add(repository.url)
    source = await world.source("synced", first)
    assert (source.applied, source.reason) == (first, "")
    assert runs(world.ledger.state) == {"api": "ok", "web": "ok"}
    (deploy,) = world.ledger.state.deploys.values()
    assert (deploy.origin.commit, deploy.origin.subject, deploy.origin.author) == (
        first, "begin", "Ada <ada@example.com>")

    second = repository.commit({"web.mill": "ok two", "api.mill": None})
    await world.source("synced", second)
    assert runs(world.ledger.state) == {"web": "ok two"}


async def test_unchanged_polls_write_nothing(world: World, repository: Repository) -> None:
    repository.commit({"web.mill": "ok"})
    await world.add(repository.url)
    await world.source("synced")
    before = world.replica.index
    await world.polls(5)
    assert world.replica.index == before


async def test_only_the_newest_of_several_commits_is_applied(
    idle: World, repository: Repository
) -> None:
    for number in range(5):
        sha = repository.commit({"web.mill": f"ok {number}"})
    async with leading(idle):
        await idle.add(repository.url)
        await idle.source("synced", sha)
    assert idle.executor.asked == [sha]


async def test_an_invalid_commit_leaves_the_cluster_alone(
    world: World, repository: Repository
) -> None:
    good = repository.commit({"web.mill": "ok"})
    await world.add(repository.url)
    await world.source("synced", good)
    bad = repository.commit({"web.mill": "invalid"})
    source = await world.source("failing", bad)
    assert source.reason == "web.mill:1:1: unknown word `invalid`"
    assert source.applied == good
    assert runs(world.ledger.state) == {"web": "ok"}
    assert len(world.ledger.state.deploys) == 1
    before = world.replica.index
    await world.polls(3)
    assert world.replica.index == before

    fixed = repository.commit({"web.mill": "ok again"})
    assert (await world.source("synced", fixed)).reason == ""


async def test_a_rolled_back_commit_is_quarantined_until_another_comes(
    world: World, repository: Repository
) -> None:
    good = repository.commit({"web.mill": "ok"})
    await world.add(repository.url)
    await world.source("synced", good)
    bad = repository.commit({"web.mill": "ill"})
    source = await world.source("failing", bad)
    assert source.reason.startswith(f"{bad[:7]} was rolled back by d-")
    assert source.reason.endswith("web is ill")
    assert (source.applied, source.quarantined) == (good, (bad,))
    await world.polls(3)
    assert world.executor.asked.count(bad) == 1
    assert runs(world.ledger.state) == {"web": "ok"}

    await world.source("synced", repository.commit({"web.mill": "ok three"}))
    assert runs(world.ledger.state) == {"web": "ok three"}


async def test_a_branch_that_goes_back_to_a_quarantined_commit_says_so(
    world: World, repository: Repository
) -> None:
    bad = repository.commit({"web.mill": "ill"})
    await world.add(repository.url)
    await world.source("failing", bad)
    await world.source("synced", repository.commit({"web.mill": "ok"}))
    git(repository.folder, "reset", "-q", "--hard", bad)
    source = await world.source("failing", bad)
    assert source.reason.startswith(f"{bad[:7]} was rolled back by d-")
    assert world.executor.asked.count(bad) == 1


async def test_sync_tries_a_quarantined_commit_again(world: World, repository: Repository) -> None:
    bad = repository.commit({"web.mill": "ill"})
    await world.add(repository.url)
    first = await world.source("failing", bad)
    world.sources.sync_now("app")
    await world.until(lambda s: s.sources["app"].reason not in ("", first.reason)
                      and s.sources["app"].status == "failing")
    assert world.executor.asked == [bad, bad]


async def test_sync_looks_at_once(world: World, repository: Repository) -> None:
    first = repository.commit({"web.mill": "ok"})
    await world.add(repository.url, poll_ms=3_600_000)
    await world.source("synced", first)
    second = repository.commit({"web.mill": "ok two"})
    world.sources.sync_now("app")
    assert (await world.source("synced", second)).applied == second


async def test_a_running_deploy_shows_as_deploying(world: World, repository: Repository) -> None:
    sha = repository.commit({"web.mill": "slow"})
    await world.add(repository.url)
    source = await world.source("deploying", sha)
    assert source.reason == world.ledger.state.active_deploy
    world.executor.finish.set()
    assert (await world.source("synced", sha)).applied == sha


async def test_a_source_waits_for_another_deploy_and_goes_on_after_it(
    world: World, repository: Repository, tmp_path: Path
) -> None:
    repository.commit({"web.mill": "slow"})
    other = Repository(tmp_path / "other")
    sha = other.commit({"api.mill": "ok"})
    await world.add(repository.url)
    await world.source("deploying")
    await world.add(other.url, "other", poll_ms=3_600_000)
    source = await world.source("waiting", sha, "other")
    assert source.reason.startswith(f"deploy {world.ledger.state.active_deploy} is running")
    world.executor.finish.set()
    await world.source("synced", sha, "other")
    await world.source("synced")
    assert set(runs(world.ledger.state)) == {"api", "web"}


async def test_waiting_writes_once_however_often_it_is_tried(
    world: World, repository: Repository
) -> None:
    sha = repository.commit({"web.mill": "busy"})
    await world.add(repository.url)
    source = await world.source("waiting", sha)
    before = world.replica.index
    await world.polls(4)
    assert world.replica.index == before
    assert len(world.executor.asked) >= 3
    assert source.reason == "node-1 has no memory left"
    world.executor.finish.set()
    await world.source("synced", sha)


async def test_an_emptied_branch_is_held_until_a_person_allows_it(
    world: World, repository: Repository
) -> None:
    good = repository.commit({"web.mill": "ok", "README.md": "."})
    await world.add(repository.url)
    await world.source("synced", good)
    empty = repository.commit({"web.mill": None})
    source = await world.source("held", empty)
    assert "--allow-empty" in source.reason
    assert source.applied == good
    world.sources.sync_now("app")
    await world.polls(2)
    assert runs(world.ledger.state) == {"web": "ok"}

    world.sources.sync_now("app", allow_empty=True)
    assert (await world.source("synced", empty)).applied == empty
    assert runs(world.ledger.state) == {}


async def test_manifests_that_name_no_service_are_held_too(
    world: World, repository: Repository
) -> None:
    await world.add(repository.url)
    await world.source("synced", repository.commit({"web.mill": "ok"}))
    source = await world.source("held", repository.commit({"web.mill": "#"}))
    assert "its manifests name no service" in source.reason
    assert runs(world.ledger.state) == {"web": "ok"}
    world.sources.sync_now("app", allow_empty=True)
    await world.source("synced", repository.head())
    assert runs(world.ledger.state) == {}


async def test_a_failure_from_outside_is_tried_again_by_itself(
    world: World, repository: Repository
) -> None:
    sha = repository.commit({"web.mill": "away"})
    await world.add(repository.url)
    source = await world.source("waiting", sha)
    assert source.reason == "registry.example.com does not answer"
    world.executor.finish.set()
    await world.source("synced", sha)


async def test_a_missing_branch_or_folder_changes_nothing(
    world: World, repository: Repository
) -> None:
    good = repository.commit({"deploy/web.mill": "ok"})
    await world.add(repository.url, path="/deploy")
    await world.source("synced", good)
    git(repository.folder, "branch", "-m", "main", "other")
    assert (await world.source("failing")).reason == "the repository has no branch main"
    git(repository.folder, "branch", "-m", "other", "main")
    await world.source("synced", good)
    moved = repository.commit({"deploy/web.mill": None, "elsewhere/web.mill": "ok"})
    assert (await world.source("failing", moved)).reason == "the commit has no folder /deploy"
    assert runs(world.ledger.state) == {"web": "ok"}
    before = world.replica.index
    await world.polls(3)
    assert world.replica.index == before


async def test_an_unreachable_source_comes_back(world: World, repository: Repository) -> None:
    good = repository.commit({"web.mill": "ok"})
    await world.add(repository.url)
    await world.source("synced", good)
    away = repository.folder.with_name("away")
    repository.folder.rename(away)
    source = await world.source("unreachable")
    assert (source.applied, source.reason) == (
        good, f"{repository.folder} is not a git repository")
    before = world.replica.index
    await world.polls(2)
    assert world.replica.index == before
    away.rename(repository.folder)
    assert (await world.source("synced", good)).reason == ""
    assert world.executor.asked == [good]


async def test_a_hostile_head_fails_and_what_ran_goes_on(
    world: World, repository: Repository
) -> None:
    good = repository.commit({"web.mill": "ok"})
    await world.add(repository.url)
    await world.source("synced", good)
    (repository.folder / "evil.mill").symlink_to("/etc/shadow")
    bad = repository.commit_all()
    source = await world.source("failing", bad)
    assert "evil.mill is a link" in source.reason
    assert runs(world.ledger.state) == {"web": "ok"}


async def test_a_force_push_is_followed_over_http(
    world: World, repository: Repository, server: GitServer
) -> None:
    first = repository.commit({"web.mill": "ok"})
    repository.commit({"web.mill": "ok two"})
    await world.add(server.url(repository))
    await world.source("synced", repository.head())
    git(repository.folder, "reset", "-q", "--hard", first)
    rewritten = repository.commit({"web.mill": "ok rewritten"})
    await world.source("synced", rewritten)
    assert runs(world.ledger.state) == {"web": "ok rewritten"}


async def test_credentials_come_from_a_secret_and_stay_out_of_the_log(
    world: World, repository: Repository, tmp_path: Path
) -> None:
    sha = repository.commit({"web.mill": "ok"})
    private = GitServer(tmp_path, "ada:s3cret")
    try:
        await world.add(private.url(repository), secret_ref="forge")
        await world.source("synced", sha)
        await world.add(private.url(repository), "gone", secret_ref="nothing")
        source = await world.source("failing", name="gone")
        assert source.reason == ("the source's secret nothing does not exist; "
                                 "mill secret set nothing")
        assert b"s3cret" not in world.replica.machine.dump()
    finally:
        private.close()


async def test_a_corrected_secret_is_tried_at_once(
    world: World, repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha = repository.commit({"web.mill": "ok"})
    monkeypatch.setitem(SECRETS, "forge", "ada:wrong")
    private = GitServer(tmp_path, "ada:s3cret")
    try:
        await world.add(private.url(repository), secret_ref="forge", poll_ms=3_600_000)
        source = await world.source("unreachable")
        assert "does not accept the source's credentials" in source.reason
        monkeypatch.setitem(SECRETS, "forge", "ada:s3cret")
        await world.ledger.propose(c.SetSecret("forge", b"nonce", b"sealed"))
        await world.source("synced", sha)
    finally:
        private.close()


async def test_a_removed_source_is_followed_no_more(world: World, repository: Repository) -> None:
    repository.commit({"web.mill": "ok"})
    await world.add(repository.url)
    await world.source("synced")
    await world.ledger.propose(c.RemoveSource("app"))
    repository.commit({"web.mill": "ok two"})
    async with asyncio.timeout(DEADLINE_S):
        while world.sources.next_poll_ms("app") is not None:
            await asyncio.sleep(0.01)
    with pytest.raises(NotFound):
        world.sources.sync_now("app")
    assert runs(world.ledger.state) == {"web": "ok"}

    await world.add(repository.url)  # the same again starts from nothing
    await world.source("synced", repository.head())
    assert runs(world.ledger.state) == {"web": "ok two"}


async def test_a_source_replaced_between_two_wakings_starts_from_nothing(
    world: World, repository: Repository
) -> None:
    sha = repository.commit({"web.mill": "ok"})
    await world.add(repository.url)
    await world.source("synced", sha)
    again = Source(name="app", url=repository.url, poll_ms=50)
    for command in (c.RemoveSource("app"), c.PutSource(again)):  # nobody runs in between
        world.replica.index += 1
        world.replica.machine.apply(world.replica.index, encode_entry(Entry(0, command)))
    world.ledger.woken(world.replica.index)
    await world.source("synced", sha)
    assert world.executor.asked == [sha, sha]


async def test_a_suspended_source_is_left_alone(world: World, repository: Repository) -> None:
    first = repository.commit({"web.mill": "ok"})
    await world.add(repository.url)
    await world.source("synced", first)
    await world.ledger.propose(c.ObserveSource(name="app", status="suspended"))
    repository.commit({"web.mill": "ok two"})
    await world.polls(3)
    assert runs(world.ledger.state) == {"web": "ok"}
    with pytest.raises(Conflict, match="suspended"):
        world.sources.sync_now("app")


async def test_a_second_source_of_one_name_is_refused(
    world: World, repository: Repository
) -> None:
    await world.add(repository.url)
    with pytest.raises(CommandRefused):
        await world.add(repository.url)
