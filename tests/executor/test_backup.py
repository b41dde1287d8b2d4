"""The file of a backup: sealed, checked, and all that is needed to bring a cluster back."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.errors import Conflict, Unprocessable
from reconciler.executor.backup import MAGIC, make_backup, open_backup, restore
from reconciler.fsm import commands as c
from reconciler.fsm.records import Source
from reconciler.fsm.seal import seal, unseal
from reconciler.fsm.state import State
from tests.executor.world import service, world
from tests.fsm.machine import cluster
from tests.fsm.machine import service as spec
from tests.replica import memory_ledger

OLD, NEW = bytes(range(32)), bytes(range(1, 33))
PASSPHRASE = "correct horse battery"
VALUE = "postgres://u:hunter2@db/x"


def with_secret() -> State:
    machine = cluster()
    for number in range(2):
        nonce = bytes([number]) * 12
        value = VALUE if number else "an older one"
        assert not machine.do(c.SetSecret("db", nonce, seal(OLD, nonce, "db", value)))
    machine.deploy(spec("web"))
    return machine.state


MADE = make_backup(with_secret(), OLD, PASSPHRASE, os.urandom)
"""Made once: the passphrase costs a third of a second each time."""


async def test_a_backup_opens_in_a_cluster_with_another_key() -> None:
    ledger, replica = memory_ledger()
    await ledger.propose(c.InitCluster("new", "t", "0" * 64))
    index, carried = await restore(ledger, open_backup(MADE, PASSPHRASE), NEW, os.urandom)
    assert index == ledger.state.index
    assert carried.cluster == "test"
    versions = ledger.state.secrets["db"].versions
    assert [v.version for v in versions] == [1, 2]
    assert unseal(NEW, versions[1].nonce, "db", versions[1].sealed) == VALUE
    assert unseal(NEW, versions[0].nonce, "db", versions[0].sealed) == "an older one"
    assert not any(b"hunter2" in entry for entry in replica.entries)


async def test_large_contents_go_in_entries_below_the_bound() -> None:
    machine = cluster()
    for number in range(8):
        name, value, nonce = f"s{number}", os.urandom(60_000).hex(), os.urandom(12)
        assert not machine.do(c.SetSecret(name, nonce, seal(OLD, nonce, name, value)))
    data = make_backup(machine.state, OLD, PASSPHRASE, os.urandom)
    ledger, replica = memory_ledger()
    await restore(ledger, open_backup(data, PASSPHRASE), NEW, os.urandom)
    assert len(replica.entries) > 4
    assert max(map(len, replica.entries)) < 256 * 1024
    assert ledger.state.secrets.keys() == machine.state.secrets.keys()


def test_nothing_secret_is_readable_in_the_file_and_where_it_is_from_is() -> None:
    for text in (b"hunter2", b"web", OLD, OLD.hex().encode()):
        assert text not in MADE
    assert MADE.startswith(MAGIC)
    assert b'"cluster":"test"' in MADE


def test_the_wrong_passphrase_and_a_damaged_file_are_told_apart() -> None:
    with pytest.raises(Unprocessable, match="passphrase does not open"):
        open_backup(MADE, PASSPHRASE + "!")
    for at in (len(MAGIC) + 2, len(MAGIC) + 40, len(MADE) // 2, len(MADE) - 1):
        damaged = bytearray(MADE)
        damaged[at] ^= 1
        with pytest.raises(Unprocessable, match="damaged"):
            open_backup(bytes(damaged), PASSPHRASE)
    with pytest.raises(Unprocessable, match="damaged"):
        open_backup(MADE[:-1], PASSPHRASE)
    with pytest.raises(Unprocessable, match="no backup"):
        open_backup(b"something else", PASSPHRASE)


@given(st.binary(max_size=300))
@settings(max_examples=100)
def test_no_bytes_are_taken_for_a_backup(data: bytes) -> None:
    for tried in (data, MAGIC + data):
        with pytest.raises(Unprocessable):
            open_backup(tried, PASSPHRASE)


@pytest.mark.parametrize("passphrase", ["", "short", "x" * 2000])
def test_there_is_no_backup_without_a_good_passphrase(passphrase: str) -> None:
    with pytest.raises(Unprocessable, match="passphrase"):
        make_backup(with_secret(), OLD, passphrase, os.urandom)


async def test_a_cluster_that_is_not_empty_is_left_alone() -> None:
    ledger, replica = memory_ledger()
    await ledger.propose(c.PutSource(Source(name="mine", url="file:///x")))
    with pytest.raises(Conflict, match="source mine"):
        await restore(ledger, open_backup(MADE, PASSPHRASE), NEW, os.urandom)
    assert len(replica.entries) == 1


async def test_what_ran_before_runs_again_after_a_restore(tmp_path: Path) -> None:
    """From one world's deploy to another's containers, started by the loop that heals."""
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    async with world(tmp_path / "old") as old:
        await old.ended(await old.deploy(service("web", replicas=3), service("api")))
        data = make_backup(old.ledger.state, OLD, PASSPHRASE, os.urandom)
        before = old.ledger.state
    async with world(tmp_path / "new", nodes=2) as new:
        await restore(new.ledger, open_backup(data, PASSPHRASE), NEW, os.urandom)
        async with asyncio.timeout(60):
            state = await new.ledger.until(lambda s: sum(
                a.live and a.status == "healthy" for a in s.allocations.values()) == 4)
        assert state.specs == before.specs
        for name, count in (("web", 3), ("api", 1)):
            running = [a for a in state.of_service(name) if a.live]
            assert sorted(a.slot for a in running) == list(range(count))
            assert all(a.revision == before.services[name].live for a in running)
            assert all(a.routed for a in running)
            assert state.services[name].vip == before.services[name].vip
        assert len(new.containers()) == 4
        # And it is a cluster like any other: the next deploy goes over it.
        done = await new.ended(await new.deploy(service("web", replicas=2, user="7")))
        assert done.outcome == "deployed"
