"""A lost majority: one node goes on alone with what its own log holds.

Not an act of Raft: what the lost nodes alone had acknowledged is gone, and if they are not
lost after all they form another cluster, whose log diverges from this one. So it is done by
hand, on one node, and the others join anew with empty folders.

The log gets a configuration entry, in a new term, by which this node is the only voter. At
its next start it leads at once, and what it holds is committed, entries that no majority ever
had among it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reconciler.log import configuration, journal
from reconciler.log.disk import Disk, OsDisk
from reconciler.log.errors import LogFailed
from reconciler.log.journal import Journal, check_beside_snapshot
from reconciler.log.records import NO_OP, Entry
from reconciler.log.rejoin import MARK, is_rejoining
from reconciler.log.reopening import reopen
from reconciler.log.settings import Member, Membership
from reconciler.log.snapshot import Snapshots


@dataclass(frozen=True)
class Held:
    """Where a log ends: compare these of all nodes that are left, and recover the greatest.

    `term` is the last entry's; of two logs the one with the greater (term, index) has more.
    """

    index: int
    term: int


def held(folder: Path) -> Held:
    """What the log in `folder` holds; raises as `recover` does. Changes nothing of it."""
    disk = OsDisk(folder)
    try:
        log = _open(disk)
        try:
            return Held(log.last.index, log.last.term)
        finally:
            log.close()
    finally:
        disk.close()


def recover(folder: Path, me: Member) -> Held:
    """Make `me` the only member of the log in `folder`, whose node does not run.

    Returns where the log ended before. May be repeated. Raises LogFailed where there is no log,
    where it runs, or where it waits to rejoin, so holds nothing; LogDamaged; DiskFailed.
    """
    disk = OsDisk(folder)
    try:
        return alone(disk, me)
    finally:
        disk.close()


def alone(disk: Disk, me: Member) -> Held:
    """As `recover`, on an open disk."""
    log = _open(disk)
    last = log.last
    term = max(log.term, last.term) + 1
    log.store_vote(term, me.name)
    log.append(configuration.entry_of(Membership((me,)), last.index + 1, term))
    log.close()
    return Held(last.index, last.term)


def _open(disk: Disk) -> Journal:
    if is_rejoining(disk):
        raise LogFailed(
            "this node's log was moved aside and waits for its peers", at=disk.where(MARK),
            hint="recover another node, or put the files that were moved aside back",
        )  # fmt: skip
    if disk.read(journal.NAME) is None:
        raise LogFailed("there is no log here", at=disk.where(journal.NAME),
                        hint="recover a node that was a voter, in its own data folder")
    log = reopen(disk)
    stored = Snapshots(disk).load()
    check_beside_snapshot(log, 1 if stored is None else stored.index, disk.where(journal.NAME))
    if stored is not None and not log.holds(stored.index, stored.term):
        # Killed between storing a leader's snapshot and resetting the journal.
        log.reset(Entry(NO_OP, stored.index, stored.term))
    if not len(log):
        raise LogFailed("the log is empty", at=disk.where(journal.NAME),
                        hint="recover another node")
    return log
