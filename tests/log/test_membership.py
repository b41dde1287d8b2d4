"""Voters and learners come and go while the cluster serves: real replicas over TLS."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from reconciler.errors import Conflict, MillError
from reconciler.log import acquaintance, recover, rejoin
from reconciler.log.replica import (
    AddLearner,
    ChangeUnderWay,
    Demote,
    LogFailed,
    Member,
    Membership,
    NobodyTakesOver,
    NotCaughtUp,
    NotLeader,
    OutcomeUnknown,
    Promote,
    Remove,
    Replica,
)
from tests.log.cluster import DEADLINE_S, Cluster, Ledger, free_members, running, until


def cluster_of(
    folder: Path, machines: int, founding: int, snapshot_bytes: int = 8 << 20
) -> Cluster:
    """`machines` have addresses, the first of them found the log."""
    cluster = Cluster(folder, machines, snapshot_bytes)
    cluster.founding = cluster.members[:founding]
    return cluster


async def change(cluster: Cluster, wanted: AddLearner | Promote | Demote | Remove) -> int:
    """Ask the leader, and again where the time was wrong."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            leader = await cluster.leader()
            try:
                return await leader.change(wanted)
            except (ChangeUnderWay, NotCaughtUp, NotLeader, OutcomeUnknown):
                await asyncio.sleep(0.02)


async def grow(cluster: Cluster, *numbers: int) -> None:
    """Start machines, and make them voters one after the other."""
    for number in numbers:
        member = cluster.members[number - 1]
        await cluster.start(member.name)
        await change(cluster, AddLearner(member))
        await change(cluster, Promote(member.name))


async def write(cluster: Cluster, command: bytes) -> None:
    """On whoever leads; NotLeader says that nothing was written."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                await (await cluster.leader()).propose(command)
            except NotLeader:
                await asyncio.sleep(0.01)
            else:
                return


def names(members: tuple[Member, ...]) -> set[str]:
    return {each.name for each in members}


async def settled(cluster: Cluster, voters: set[str], learners: set[str]) -> None:
    """Every running replica sees these."""
    await until(
        lambda: all(
            names(each.membership.voters) == voters and names(each.membership.learners) == learners
            for each in cluster.replicas.values()
        ),
        f"everybody sees {voters} and {learners}",
    )


@pytest.mark.parametrize("snapshot_bytes", [8 << 20, 2000], ids=["entries", "snapshot"])
async def test_one_voter_becomes_three_then_five_then_three_and_loses_nothing(
    tmp_path: Path, snapshot_bytes: int
) -> None:
    cluster = cluster_of(tmp_path, 5, 1, snapshot_bytes)
    try:
        await cluster.start("node-1")
        for number in range(20):
            await write(cluster, b"1.%d" % number + bytes(200))
        await grow(cluster, 2, 3)
        await write(cluster, b"three")
        await grow(cluster, 4, 5)
        everybody = {f"node-{number}" for number in range(1, 6)}
        await settled(cluster, everybody, set())
        assert len(await cluster.agree()) == 21
        # Five voters serve without two of them.
        away = [each for each in everybody if not cluster.replicas[each].is_leader][:2]
        await cluster.stop(*away)
        await write(cluster, b"two are away")
        for name in away:
            await change(cluster, Remove(name))
        await settled(cluster, everybody - set(away), set())
        await write(cluster, b"three again")
        assert len(await cluster.agree()) == 23
        await cluster.stop()
        kept = everybody - set(away)
        await cluster.start(*kept)
        await write(cluster, b"after a restart")
        await settled(cluster, kept, set())
        assert len(await cluster.agree()) == 24
    finally:
        await cluster.stop()


async def test_a_learner_follows_and_its_absence_hinders_nobody(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, 2, 1)
    try:
        await cluster.start()
        await change(cluster, AddLearner(cluster.members[1]))
        await write(cluster, b"one")
        learner = cluster.replicas["node-2"]
        await until(lambda: cluster.ledgers["node-2"].commands == [b"one"], "it follows")
        assert learner.leader == "node-1"
        assert not learner.membership.votes("node-2")
        progress = (await cluster.leader()).progress()["node-2"]
        assert progress.connected
        assert progress.matched > 0
        assert learner.progress() == {}
        with pytest.raises(NotLeader):
            await learner.propose(b"x")
        await cluster.stop("node-2")
        await write(cluster, b"two")
        assert (await cluster.leader()).progress()["node-2"].matched > 0
        await cluster.start("node-2")
        assert await cluster.agree() == [b"one", b"two"]
    finally:
        await cluster.stop()


async def test_learners_alone_elect_nobody(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, 3, 1)
    try:
        await cluster.start()
        for member in cluster.members[1:]:
            await change(cluster, AddLearner(member))
        await settled(cluster, {"node-1"}, {"node-2", "node-3"})
        await cluster.stop("node-1")
        terms = {name: each.term for name, each in cluster.replicas.items()}
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3 * cluster.settings("node-2").timing.election_max_s):
                await cluster.leader()
        assert {name: each.term for name, each in cluster.replicas.items()} == terms
    finally:
        await cluster.stop()


async def test_a_second_change_is_refused_while_the_first_is_not_committed(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, 5, 3)
    try:
        await cluster.start("node-1", "node-2", "node-3")
        leader = await cluster.leader()
        await until(
            lambda: all(each.connected for each in leader.progress().values()), "all connected"
        )
        first = asyncio.create_task(leader.change(AddLearner(cluster.members[3])))
        second = asyncio.create_task(leader.change(AddLearner(cluster.members[4])))
        with pytest.raises(ChangeUnderWay):
            await second
        index = await first
        assert leader.membership.index == index
        # What is so already is not written again.
        assert await leader.change(AddLearner(cluster.members[3])) == index
    finally:
        await cluster.stop()


async def test_a_learner_that_is_not_heard_or_not_known_is_not_promoted(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, 2, 1)
    try:
        await cluster.start("node-1")
        await change(cluster, AddLearner(cluster.members[1]))
        leader = await cluster.leader()
        with pytest.raises(NotCaughtUp):
            await leader.change(Promote("node-2"))
        with pytest.raises(MillError, match="node-9"):
            await leader.change(Promote("node-9"))
        await write(cluster, b"still serves")
    finally:
        await cluster.stop()


async def test_the_last_voter_cannot_go_and_two_cannot_become_one_that_is_dead(
    tmp_path: Path,
) -> None:
    cluster = cluster_of(tmp_path, 3, 3)
    try:
        await cluster.start()
        leader = await cluster.leader()
        follower, away = (name for name in cluster.replicas if not cluster.replicas[name].is_leader)
        await cluster.stop(away)
        await until(lambda: leader.progress()[away].heard_s > 1.5, "it is missed")
        with pytest.raises(ChangeUnderWay, match="answer"):
            await leader.change(Remove(follower))
        await change(cluster, Remove(away))
        await change(cluster, Remove(follower))
        with pytest.raises(NobodyTakesOver):
            await leader.change(Remove(next(iter(names(leader.membership.voters)))))
        assert isinstance(NobodyTakesOver("x"), Conflict)
        await write(cluster, b"alone")
    finally:
        await cluster.stop()


async def test_a_leader_that_is_removed_hands_over_first(tmp_path: Path) -> None:
    async with running(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        name = next(name for name, each in cluster.replicas.items() if each is leader)
        await write(cluster, b"before")
        with pytest.raises(NotLeader):
            await leader.change(Remove(name))
        assert not leader.is_leader
        await change(cluster, Remove(name))
        await until(lambda: leader.membership.get(name) is None, "it is told that it is removed")
        await write(cluster, b"after")
        terms = {each.term for each in cluster.replicas.values() if each is not leader}
        with pytest.raises(TimeoutError):  # it does not come back as a leader, nor deposes one
            async with asyncio.timeout(2.0):
                await until(lambda: leader.is_leader, "never")
        assert {e.term for e in cluster.replicas.values() if e is not leader} == terms
        await cluster.stop(name)
        assert await cluster.agree() == [b"before", b"after"]


async def test_leadership_moves_without_a_failed_write(tmp_path: Path) -> None:
    async with running(tmp_path, 3) as cluster:
        await cluster.leader()
        total, done = 400, 0

        async def writer(number: int) -> None:
            nonlocal done
            for each in range(total // 8):
                await write(cluster, b"%d.%d" % (number, each))
                done += 1

        writers = [asyncio.create_task(writer(number)) for number in range(8)]
        for step in range(1, 4):
            await until(lambda: done >= step * total // 4, "some were written")  # noqa: B023  # at once
            leader = await cluster.leader()
            to = [name for name, each in cluster.replicas.items() if each is not leader][step % 2]
            await leader.transfer(to)
            await until(lambda: cluster.replicas[to].is_leader, "it leads")  # noqa: B023  # at once
        await asyncio.gather(*writers)  # OutcomeUnknown would have failed one
        commands = await cluster.agree()
        assert len(commands) == len(set(commands)) == total


async def test_nobody_takes_over_who_is_not_there(tmp_path: Path) -> None:
    async with running(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        follower = next(n for n, each in cluster.replicas.items() if each is not leader)
        await cluster.stop(follower)
        await until(lambda: not leader.progress()[follower].connected, "it is gone")
        with pytest.raises(NobodyTakesOver, match=follower):
            await leader.transfer(follower)
        with pytest.raises(NotLeader):
            await cluster.followers()[0].transfer()
        await write(cluster, b"goes on")


async def test_callbacks_tell_of_each_membership(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, 2, 1)
    try:
        seen: list[Membership] = []
        await cluster.start()
        cluster.replicas["node-2"].on_membership(seen.append)
        await change(cluster, AddLearner(cluster.members[1]))
        await change(cluster, Promote("node-2"))
        await until(lambda: seen and seen[-1].votes("node-2"), "node-2 votes, it is told")
        assert [each.index for each in seen] == sorted(each.index for each in seen)
        moved = dataclasses.replace(cluster.members[1], host="127.0.0.2")
        leader = await cluster.leader()
        await change(cluster, AddLearner(moved))
        assert leader.membership.get("node-2") == moved
        assert leader.membership.votes("node-2"), "a new address changes no role"
    finally:
        await cluster.stop()


async def test_a_lost_majority_is_recovered_from_one_log(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, 3, snapshot_bytes=2000)
    try:
        await cluster.start()
        for number in range(30):
            await write(cluster, b"%d" % number + bytes(100))
        commands = await cluster.agree()
        await cluster.stop()
        held = recover.held(tmp_path / "node-1")
        assert recover.recover(tmp_path / "node-1", cluster.members[0]) == held
        await cluster.start("node-1")
        await write(cluster, b"alone")
        replica = cluster.replicas["node-1"]
        assert replica.membership.everyone == (cluster.members[0],)
        assert replica.term > held.term
        assert cluster.ledgers["node-1"].commands == [*commands, b"alone"]
        with pytest.raises(LogFailed, match="another process"):
            recover.recover(tmp_path / "node-1", cluster.members[0])
        # The others come again with empty folders, one under its old name.
        for name in ("node-2", "node-3"):
            (tmp_path / name).rename(tmp_path / f"{name}-lost")
        cluster.founding = cluster.members[:1]
        await grow(cluster, 2, 3)
        await write(cluster, b"three")
        assert await cluster.agree() == [*commands, b"alone", b"three"]
    finally:
        await cluster.stop()


def test_there_is_nothing_to_recover_in_an_empty_folder_or_one_that_rejoins(tmp_path: Path) -> None:
    me = free_members(1)[0]
    with pytest.raises(LogFailed, match="no log here"):
        recover.recover(tmp_path / "empty", me)
    rejoin.begin(tmp_path / "aside")
    with pytest.raises(LogFailed, match="waits for its peers"):
        recover.recover(tmp_path / "aside", me)


async def test_who_founded_alone_rejoins_by_what_it_kept_beside_its_log(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path, 3, 1)
    try:
        await cluster.start("node-1")
        await grow(cluster, 2, 3)
        await write(cluster, b"one")
        await settled(cluster, {"node-1", "node-2", "node-3"}, set())
        await until(lambda: _kept(tmp_path / "node-1") == 3, "it keeps the members")
        await cluster.stop("node-1")
        rejoin.begin(tmp_path / "node-1")
        await cluster.start("node-1")
        await until(lambda: not (tmp_path / "node-1" / rejoin.MARK).exists(), "it has rejoined")
        await write(cluster, b"two")
        assert await cluster.agree() == [b"one", b"two"]
        await settled(cluster, {"node-1", "node-2", "node-3"}, set())
    finally:
        await cluster.stop()


def _kept(folder: Path) -> int:
    file = folder / acquaintance.NAME
    return file.read_bytes().count(b"node-") if file.exists() else 0


async def test_a_certificate_is_read_again_for_new_connections(tmp_path: Path) -> None:
    async with running(tmp_path, 2) as cluster:
        await write(cluster, b"one")
        replica: Replica = cluster.replicas["node-1"]
        cluster.authority.issue("node-1")
        replica.reload_identity()
        await cluster.stop("node-2")
        await cluster.start("node-2")
        await write(cluster, b"two")
        cert_file, _ = cluster.authority.issue("node-1")
        cert_file.write_bytes(b"rot")
        with pytest.raises(LogFailed, match="certificate"):
            replica.reload_identity()
        cluster.authority.issue("node-1")  # the one in use stayed: node-2 comes back all the same
        await cluster.stop("node-2")
        await cluster.start("node-2")
        await write(cluster, b"three")
        assert await cluster.agree() == [b"one", b"two", b"three"]
        assert isinstance(cluster.ledgers["node-1"], Ledger)
