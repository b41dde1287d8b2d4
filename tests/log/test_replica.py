from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from reconciler.log import journal, snapshot
from reconciler.log.replica import (
    MAX_PROPOSALS,
    CommandTooLarge,
    LogBusy,
    LogDamaged,
    LogFailed,
    NoMajority,
    NotLeader,
    OutcomeUnknown,
    Replica,
)
from reconciler.log.wire import MAX_COMMAND_BYTES
from tests.log.cluster import Cluster, Ledger, running, until


async def test_three_replicas_apply_the_same_commands_in_the_same_order(tmp_path: Path) -> None:
    async with running(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        results = await asyncio.gather(*(leader.propose(b"%d" % n) for n in range(100)))
        assert sorted(result for _, result in results) == list(range(1, 101))
        assert sorted(await cluster.agree()) == sorted(b"%d" % n for n in range(100))


async def test_the_result_is_of_this_command_and_already_applied_here(tmp_path: Path) -> None:
    async with running(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        for number in range(1, 20):
            index, result = await leader.propose(b"one more")
            assert result == number
            assert leader.applied_index >= index


async def test_a_follower_refuses_and_names_the_leader(tmp_path: Path) -> None:
    async with running(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        name = next(name for name, each in cluster.replicas.items() if each is leader)
        follower = cluster.followers()[0]
        await until(lambda: follower.leader == name, "the follower knows the leader")
        with pytest.raises(NotLeader) as refused:
            await follower.propose(b"x")
        assert refused.value.leader == name
        with pytest.raises(NotLeader):
            await follower.read_index()
        assert await cluster.agree() == []


async def test_one_replica_alone_commits(tmp_path: Path) -> None:
    async with running(tmp_path, 1) as cluster:
        leader = await cluster.leader()
        assert (await leader.propose(b"alone"))[1] == 1
        assert await leader.read_index() == leader.applied_index


async def test_a_follower_hears_of_a_commit_without_waiting_for_a_heartbeat(
    tmp_path: Path,
) -> None:
    # 50 commits one after the other, each awaited on both followers: at one heartbeat of
    # 100 ms each that is 5 s at least; the ratio to the leader's own time says it is not so.
    async with running(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        followers = cluster.followers()
        await leader.propose(b"warm")
        loop = asyncio.get_running_loop()
        waits = []
        for _ in range(50):
            index, _ = await leader.propose(b"x")
            began = loop.time()
            await asyncio.gather(*(each.wait_applied(index, 10.0) for each in followers))
            waits.append(loop.time() - began)
        assert sorted(waits)[25] < 0.5 * leader._settings.timing.heartbeat_s


async def test_on_applied_is_called_in_the_loop_on_every_node(tmp_path: Path) -> None:
    async with running(tmp_path, 3) as cluster:
        loop = asyncio.get_running_loop()
        seen: dict[str, list[int]] = {name: [] for name in cluster.replicas}
        for name, replica in cluster.replicas.items():

            def note(index: int, name: str = name) -> None:
                assert asyncio.get_running_loop() is loop
                seen[name].append(index)

            replica.on_applied(note)
        index, _ = await (await cluster.leader()).propose(b"x")
        await until(lambda: all(index in each or max(each, default=0) >= index
                                for each in seen.values()), "all were told")  # fmt: skip
        assert all(each == sorted(each) for each in seen.values())


async def test_a_graceful_stop_hands_leadership_over(tmp_path: Path) -> None:
    async with running(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        await leader.propose(b"before")
        await cluster.agree()
        term = leader.term
        name = next(name for name, each in cluster.replicas.items() if each is leader)
        told: list[tuple[bool, int]] = []
        leader.on_leadership(lambda leading, term: told.append((leading, term)))
        await cluster.stop(name)
        assert [leading for leading, _ in told] == [False]
        successor = await cluster.leader()
        assert successor.term == term + 1, "by transfer, without a second election"
        await successor.propose(b"after")
        assert await cluster.agree() == [b"before", b"after"]


async def test_a_leader_without_a_majority_lets_go_and_answers_nobody(tmp_path: Path) -> None:
    async with running(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        await leader.propose(b"whole")
        others = [name for name, each in cluster.replicas.items() if each is not leader]
        await cluster.stop(*others)
        if leader.is_leader:
            with pytest.raises((OutcomeUnknown, NotLeader)):
                await leader.propose(b"alone")
        await until(lambda: not leader.is_leader, "it steps down")
        with pytest.raises(NotLeader):
            await leader.propose(b"later")
        with pytest.raises((NotLeader, NoMajority)):
            await leader.read_index()
        await cluster.start(others[0])
        successor = await cluster.leader()
        await successor.propose(b"again")
        commands = await cluster.agree()
        assert [each for each in commands if each != b"alone"] == [b"whole", b"again"]


async def test_reads_see_every_write_before_them(tmp_path: Path) -> None:
    async with running(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        for _ in range(20):
            index, _ = await leader.propose(b"x")
            reads = await asyncio.gather(*(leader.read_index() for _ in range(10)))
            assert min(reads) >= index
        assert await leader.confirm_leader() == leader.term


async def test_state_is_there_after_a_stop_and_a_start(tmp_path: Path) -> None:
    async with running(tmp_path, 3) as cluster:
        for number in range(20):
            await (await cluster.leader()).propose(b"%d" % number)
        await cluster.stop()
        await cluster.start()
        await (await cluster.leader()).propose(b"last")
        assert await cluster.agree() == [*(b"%d" % number for number in range(20)), b"last"]


async def test_an_empty_follower_catches_up_by_snapshot_while_the_cluster_serves(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, 3, snapshot_bytes=64 << 10) as cluster:
        leader = await cluster.leader()
        absent = next(name for name, each in cluster.replicas.items() if each is not leader)
        await cluster.stop(absent)
        for _ in range(20):
            await asyncio.gather(*(leader.propose(bytes(1000)) for _ in range(32)))
        lead = next(name for name, each in cluster.replicas.items() if each is leader)
        assert (tmp_path / lead / snapshot.NAME).exists()
        assert (tmp_path / lead / journal.NAME).stat().st_size < 20 * 32 * 1000
        await cluster.start(absent)
        follower = cluster.replicas[absent]
        moved: list[int] = []
        follower.on_applied(moved.append)
        index, _ = await leader.propose(b"served")
        await follower.wait_applied(index, 30.0)
        assert (tmp_path / absent / snapshot.NAME).exists()
        assert moved
        assert len(await cluster.agree()) == 20 * 32 + 1
        await cluster.stop()
        await cluster.start()
        await cluster.leader()
        assert len(await cluster.agree()) == 20 * 32 + 1


async def test_a_large_command_goes_through_and_a_larger_one_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path, 3) as cluster:
        leader = await cluster.leader()
        await leader.propose(bytes(MAX_COMMAND_BYTES))
        with pytest.raises(CommandTooLarge):
            await leader.propose(bytes(MAX_COMMAND_BYTES + 1))
        assert [len(command) for command in await cluster.agree()] == [MAX_COMMAND_BYTES]


async def test_a_damaged_journal_stops_the_start_and_says_where(tmp_path: Path) -> None:
    async with running(tmp_path, 1) as cluster:
        await (await cluster.leader()).propose(b"x")
    file = tmp_path / "node-1" / journal.NAME
    data = bytearray(file.read_bytes())
    data[30] ^= 1
    file.write_bytes(data)
    replica = Replica(cluster.settings("node-1"), Ledger())
    with pytest.raises(LogDamaged) as refused:
        await replica.start()
    assert refused.value.path == str(file)
    assert refused.value.offset_bytes == 11
    assert refused.value.hint
    file.write_bytes(bytes(data[:30]) + bytes([data[30] ^ 1]) + bytes(data[31:]))
    replica = Replica(cluster.settings("node-1"), Ledger())
    await replica.start()
    await replica.stop()


async def test_a_damaged_snapshot_stops_the_start(tmp_path: Path) -> None:
    async with running(tmp_path, 1, snapshot_bytes=1000) as cluster:
        for _ in range(30):
            await (await cluster.leader()).propose(bytes(100))
    file = tmp_path / "node-1" / snapshot.NAME
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(LogDamaged, match=snapshot.NAME):
        await Replica(cluster.settings("node-1"), Ledger()).start()
    file.unlink()
    with pytest.raises(LogDamaged, match="missing"):
        await Replica(cluster.settings("node-1"), Ledger()).start()


async def test_two_replicas_never_share_a_folder(tmp_path: Path) -> None:
    async with running(tmp_path, 1) as cluster:
        with pytest.raises(LogFailed, match="another process"):
            await Replica(cluster.settings("node-1"), Ledger()).start()


async def test_a_taken_port_is_said(tmp_path: Path) -> None:
    async with running(tmp_path, 1) as cluster:
        (tmp_path / "other").mkdir()
        other = Cluster(tmp_path / "other", 0)
        other.members = cluster.members
        with pytest.raises(LogFailed, match="cannot listen"):
            await Replica(other.settings("node-1"), Ledger()).start()


async def test_more_than_can_be_under_way_is_refused_at_once(tmp_path: Path) -> None:
    async with running(tmp_path, 1) as cluster:
        leader = await cluster.leader()
        many = [leader.propose(b"x") for _ in range(MAX_PROPOSALS + 10)]
        answers = await asyncio.gather(*many, return_exceptions=True)
        refused = [each for each in answers if isinstance(each, LogBusy)]
        assert len(refused) == 10
        assert len(await cluster.agree()) == MAX_PROPOSALS
        await leader.propose(b"room again")


class Faulty(Ledger):
    """A machine that breaks its promise not to raise."""

    def apply(self, index: int, command: bytes) -> object:
        if command == b"bad":
            raise ZeroDivisionError
        return super().apply(index, command)


async def test_an_exception_in_the_raft_thread_ends_this_node_alone(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, 1)
    replica = Replica(cluster.settings("node-1"), Faulty())
    await replica.start()
    await until(lambda: replica.is_leader, "a leader")
    await replica.propose(b"good")
    with pytest.raises(OutcomeUnknown):
        await replica.propose(b"bad")
    with pytest.raises(ZeroDivisionError):
        await replica.fatal
    assert not replica.is_leader
    with pytest.raises(LogFailed):
        await replica.propose(b"good")
    await replica.stop()


async def test_a_proposer_that_is_cancelled_as_its_answer_comes_is_cancelled(
    tmp_path: Path
) -> None:
    async with running(tmp_path, 1) as cluster:
        leader = await cluster.leader()
        task = asyncio.create_task(leader.propose(b"x"))
        # In the very call that hands over the answer, as when that answer is the lost leadership.
        leader.on_applied(lambda _index: task.cancel())
        with pytest.raises(asyncio.CancelledError):
            await task
