"""The log with one promise broken on purpose: the simulation has to notice each.

`python -m tests.sim.mutants --seeds 0..300` says after how many seeds it did.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Iterator

from reconciler.log import configuration, snapshot
from reconciler.log.configuration import Change
from reconciler.log.core import CoreJournal, Peer
from reconciler.log.errors import NotLeader
from reconciler.log.hardening import Raft
from reconciler.log.journal import NAME, Journal
from reconciler.log.members import ChangeDone, Members
from reconciler.log.reads import Reads
from reconciler.log.records import Entry
from reconciler.log.rejoin import MARK, Rejoin
from reconciler.log.replication import Replication
from reconciler.log.snapshot import Snapshots
from reconciler.log.wire import Ack, Append, Chunk, Message, PreVote, RequestVote
from tests.sim import run as simulation
from tests.sim.disk import SimDisk, SimFile
from tests.sim.world import SimMachine

Replace = Callable[[type, str, Callable[..., object]], None]


def skip_sync(replace: Replace) -> None:
    """The journal's sync only empties its buffer into the page cache."""
    replace(SimFile, "sync", lambda file: None)


def forget_vote(replace: Replace) -> None:
    """Votes are not stored, only terms."""
    store = CoreJournal.setCurrentTerm
    replace(CoreJournal, "setCurrentTerm", lambda core, term, vote: store(core, term, None))


def acknowledge_early(replace: Replace) -> None:
    """A follower answers before its sync."""

    def hold(replication: Replication, peer: Peer, ack: Ack) -> None:
        replication._raft.transport.transmit(peer, ack)

    replace(Replication, "_hold", hold)
    replace(Raft, "doTick", _tick_with_late_sync)


def _tick_with_late_sync(raft: Raft, wait_s: float = 0.0) -> None:
    # As a slow disk would have it: synced at the end of the tick, after the next ticks' messages.
    raft.elections.gate()
    raft.reads.start()
    super(Raft, raft).doTick(wait_s)
    raft.replication.release()
    raft.reads.settle()


def read_without_majority(replace: Replace) -> None:
    """A leader answers reads because it thinks that it leads."""
    replace(Reads, "_confirmed", lambda reads, number: True)


def apply_twice(replace: Replace) -> None:
    """Every hundredth entry is applied again."""
    apply = Raft._apply

    def again(raft: Raft, entry: Entry) -> None:
        apply(raft, entry)
        if entry.index % 100 == 0:
            apply(raft, entry)

    replace(Raft, "_apply", again)


def take_old_ack(replace: Replace) -> None:
    """An acknowledgement counts in whatever term it arrives, and whatever question it answers."""
    on_ack = Replication.on_ack

    def any_term(replication: Replication, peer: Peer, ack: Ack) -> None:
        raft = replication._raft
        next_index = min(ack.next_index, raft.journal.last.index + 1)
        number = max(ack.number, replication._since.get(peer.id, 0))
        now = Ack(raft.term, number, next_index, ack.success, ack.reset)
        on_ack(replication, peer, now)

    replace(Replication, "on_ack", any_term)


def truncate_without_conflict(replace: Replace) -> None:
    """A follower drops all behind the place where the logs agree, as pysyncobj does."""
    take = Replication._take

    def truncate(replication: Replication, entries: list[Entry]) -> None:
        journal = replication._raft.journal
        if entries and journal.first < entries[0].index <= journal.last.index:
            journal.cut(entries[0].index)
        take(replication, entries)

    replace(Replication, "_take", truncate)


def install_older_snapshot(replace: Replace) -> None:
    """A snapshot is installed over whatever is there."""
    replace(Replication, "_covered", lambda replication, received: False)


def commit_on_chunk(replace: Replace) -> None:
    """A part of a snapshot commits what happens to be in the follower's log."""
    on_chunk = Replication.on_chunk

    def commit(replication: Replication, peer: Peer, chunk: Chunk) -> None:
        on_chunk(replication, peer, chunk)
        raft = replication._raft
        if chunk.term == raft.term:
            raft.advance_commit(min(raft.journal.last.index, chunk.index))

    replace(Replication, "on_chunk", commit)


def commit_unverified(replace: Replace) -> None:
    """A heartbeat commits up to the end of the follower's log, matched or not."""
    on_append = Replication.on_append

    def commit(replication: Replication, peer: Peer, message: Append) -> None:
        on_append(replication, peer, message)
        raft = replication._raft
        if message.term == raft.term:
            raft.advance_commit(min(message.commit, raft.journal.last.index))

    replace(Replication, "on_append", commit)


def vote_for_the_short(replace: Replace) -> None:
    """Votes go to candidates whose log lacks committed entries."""
    receive = Raft.receive

    def boast(raft: Raft, peer: Peer, message: Message) -> None:
        match message:
            case RequestVote(term) | PreVote(term):
                message = type(message)(term, 1 << 40, 1 << 40)
        receive(raft, peer, message)

    replace(Raft, "receive", boast)


def compact_before_snapshot(replace: Replace) -> None:
    """The snapshot is kept in memory only, while the journal is cut for good."""
    store = Snapshots.store

    def store_beside(snapshots: Snapshots, data: bytes) -> None:
        if snapshot.decode(data, "").index % 2:
            store(snapshots, data)

    replace(Snapshots, "store", store_beside)


def seal_nothing(replace: Replace) -> None:
    """Cuts are not written, so a restart brings back what was cut."""

    def cut(journal: Journal, index: int) -> None:
        del journal._state.entries[index - journal.first :]

    replace(Journal, "cut", cut)


def retry_sync(replace: Replace) -> None:
    """A failed sync of the same open file is tried again, and believed."""
    sync = SimFile.sync

    def until_it_says_yes(file: SimFile) -> None:
        try:
            sync(file)
        except OSError:
            if file._disk.flaky == 0.0:
                raise
            until_it_says_yes(file)

    replace(SimFile, "sync", until_it_says_yes)


def trust_the_cache(replace: Replace) -> None:
    """A log opens again on what the cache shows, and writes on in the same file."""
    replace(SimDisk, "read_stored", SimDisk.read)
    rewrite = Journal._rewrite

    def once(journal: Journal) -> None:
        if journal._file is not None or journal._state.end == 0:
            rewrite(journal)
        else:
            journal._file = journal._disk.open(NAME)
            journal._reserved = journal._state.end

    replace(Journal, "_rewrite", once)


def trust_the_name(replace: Replace) -> None:
    """A log that opens again takes the snapshot's name for durable, whatever the sync said."""
    replace(Snapshots, "renew", lambda snapshots: None)


def keep_the_machine(replace: Replace) -> None:
    """A log that opens again applies its entries to the machine as it was."""
    replace(SimMachine, "reset", lambda machine: None)


def vote_with_an_empty_log(replace: Replace) -> None:
    """Whoever lost its disk begins as a new voter under the old name."""
    replace(Rejoin, "hears", lambda rejoin, peer, message: True)
    replace(Rejoin, "tick", _rejoined)


def _rejoined(rejoin: Rejoin) -> bool:
    rejoin._disk.remove(MARK)
    rejoin._disk.sync_folder()
    return True


def vote_before_caught_up(replace: Replace) -> None:
    """Whoever lost its disk votes again once it has taken up a term."""
    tick = Rejoin.tick

    def early(rejoin: Rejoin) -> bool:
        return _rejoined(rejoin) if rejoin._bound else tick(rejoin)

    replace(Rejoin, "tick", early)


def change_again_at_once(replace: Replace) -> None:
    """A change of the members begins while the one before it is not committed."""

    def start(members: Members, change: Change, done: ChangeDone) -> None:
        raft, present = members._raft, members.latest
        changed = configuration.changed(present, change)
        if not raft.is_raft_leader or changed is present or not changed.votes(members.me):
            raise NotLeader(None)
        entry = configuration.entry_of(changed, raft.journal.last.index + 1, raft.term)
        raft.append_own(entry, done)
        members.settle()
        raft.send_heartbeat()

    replace(Members, "_start", start)


def count_learners(replace: Replace) -> None:
    """Whoever follows is counted as a voter."""
    connect = Members._connect

    def count(members: Members) -> None:
        connect(members)
        members.voters = members.followers
        members._raft.count_voters(members.voters)

    replace(Members, "_connect", count)


def stand_without_a_vote(replace: Replace) -> None:
    """Learners, and nodes that were removed, stand for election."""
    replace(Members, "is_voter", property(lambda members: True))  # type: ignore[arg-type]  # a descriptor


MUTANTS: tuple[Callable[[Replace], None], ...] = (
    skip_sync,
    acknowledge_early,
    read_without_majority,
    apply_twice,
    truncate_without_conflict,
    install_older_snapshot,
    commit_on_chunk,
    commit_unverified,
    vote_for_the_short,
    compact_before_snapshot,
    seal_nothing,
)
OF_DISKS: tuple[Callable[[Replace], None], ...] = (  # seen only where disks fail often
    retry_sync,
    trust_the_cache,
    keep_the_machine,
)


OF_LOST_DISKS: tuple[Callable[[Replace], None], ...] = (
    vote_with_an_empty_log,
    vote_before_caught_up,
)
OF_MEMBERS: tuple[Callable[[Replace], None], ...] = (
    change_again_at_once,
    count_learners,
    stand_without_a_vote,
)
WORLDS: dict[Callable[[Replace], None], str] = {
    **dict.fromkeys(MUTANTS, ""),
    **dict.fromkeys(OF_DISKS, "bad_disks"),
    **dict.fromkeys(OF_LOST_DISKS, "lost_disks"),
    **dict.fromkeys(OF_MEMBERS, "membership"),
    # Ordinary trouble brings these out too rarely: `hard.py`.
    forget_vote: "rivals",
    take_old_ack: "stale_acks",
    trust_the_name: "lost_names",
    install_older_snapshot: "membership",
    read_without_majority: "stale_reads",
}
"""Every mutant, and the kind of world that shows it."""


@contextlib.contextmanager
def broken(mutant: Callable[[Replace], None]) -> Iterator[None]:
    """Run with one promise broken; everything is put back afterwards."""
    with contextlib.ExitStack() as undo:

        def replace(owner: type, name: str, what: Callable[..., object]) -> None:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, what)

        mutant(replace)
        yield


def caught_at(mutant: Callable[[Replace], None], seeds: range) -> tuple[int, Exception] | None:
    """The first seed that fails with the mutant, and how."""
    kind = WORLDS[mutant]
    with broken(mutant):
        for seed in seeds:
            try:
                simulation.run(seed, **({kind: True} if kind else {}))
            except Exception as error:  # noqa: BLE001  # whatever it is, it was noticed
                return seed, error
    return None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0..300")
    parser.add_argument("--only", default="")
    options = parser.parse_args(arguments)
    first, _, end = options.seeds.partition("..")
    logging.disable(logging.CRITICAL)
    missed = 0
    for mutant in WORLDS:
        if options.only not in mutant.__name__:
            continue
        caught = caught_at(mutant, range(int(first), int(end)))
        missed += caught is None
        how = "NOT CAUGHT" if caught is None else f"seed {caught[0]}: {caught[1]}"
        print(f"{mutant.__name__}: {how}"[:150], flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
