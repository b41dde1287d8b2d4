"""A voter that lost its disk comes back under its name, from its peers, without a second vote.

An empty log must not vote: the node may have voted in a term that it no longer knows, and
acknowledged entries that it no longer holds. So until it is as good as before it keeps out:

1. It asks ALL other members for their terms, and hears nothing else. Whoever it ever voted
   for, or acknowledged an entry to, was in that term by then and stored it; so the greatest
   answer is no lower than any term in which it promised something. Who they are it asks as
   well: those of the newest configuration that anybody knows (itself by what it kept beside
   its log, `acquaintance`), and of those that they know (one may lag behind). Learners too:
   one may be a voter without others' knowing it, and may have stood for election. It takes up
   the next term, its vote in it spent. The leader so far steps down: it would count what was
   acknowledged and is lost, and would never send it again.
2. It follows leaders of that term or a later one, but neither votes nor stands. What it
   acknowledges it holds, with everything below, so its acknowledgements count. Each of these
   leaders was elected without its vote, so by a majority of those who lost nothing: it holds
   all that was ever committed.
3. Once an entry of the present leader's own term is committed and held here, all before it
   is as well (Raft, 5.4.2): it is a voter again.

A file in the log's folder says so, from before its files are moved aside until step 3, so
that a crash in between begins with step 1. While another member is away, or lost its disk
too, the node waits (one that will not come back can be removed). One disk at a time: with
a majority of them gone nobody holds the data.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from reconciler.log import journal, pinned, snapshot
from reconciler.log.disk import Disk, OsDisk, replace_file
from reconciler.log.errors import DiskFailed, LogFailed
from reconciler.log.wire import (
    Ack,
    Append,
    AskTerm,
    Chunk,
    HigherTerm,
    Message,
    PreVote,
    PreVoteReply,
    RequestVote,
    TermIs,
    TimeoutNow,
    Vote,
)

if TYPE_CHECKING:
    from reconciler.log.core import Peer
    from reconciler.log.hardening import Raft

MARK = "rejoin"
ASK_S = 0.3

_log = logging.getLogger(__name__)


def begin(folder: Path) -> list[str]:
    """Move the log's files in `folder` aside; its next start rejoins. The new names.

    For a node that does not run. Raises LogFailed where it does, DiskFailed. May be repeated.
    """
    disk = OsDisk(folder)
    try:
        return set_aside(disk)
    except OSError as error:
        raise DiskFailed("the log cannot be moved aside", error, str(folder)) from error
    finally:
        disk.close()


def set_aside(disk: Disk) -> list[str]:
    """As `begin`; raises OSError."""
    replace_file(disk, MARK, (b"1",))  # first: an empty log without it would vote
    moved = []
    for name in (snapshot.NAME, journal.NAME):
        if disk.read(name) is not None:
            number = 1
            while disk.read(f"{name}.damaged-{number}") is not None:
                number += 1
            disk.rename(name, f"{name}.damaged-{number}")
            moved.append(disk.where(f"{name}.damaged-{number}"))
    disk.sync_folder()
    return moved


def is_rejoining(disk: Disk) -> bool:
    """Whether the log in this folder may not vote yet; raises DiskFailed."""
    try:
        return disk.read(MARK) is not None
    except OSError as error:
        raise DiskFailed("the log cannot be read", error, disk.where(MARK)) from error


class Rejoin:
    """Stands between a node that rejoins and what it hears; raft thread only."""

    def __init__(self, raft: Raft, disk: Disk) -> None:
        if {each.name for each in raft.members.known_last.everyone} == {raft.members.me}:
            raise LogFailed(
                "nobody else holds this log", at=disk.where(MARK),
                hint="put the files that were moved aside back, and remove this one",
            )  # fmt: skip
        self._raft, self._disk = raft, disk
        self._number = int(pinned.now() * 1e6)  # answers to a former life are not counted
        self._answers: dict[str, TermIs] = {}
        self._bound = False  # the greatest term is known, and the next one taken up
        self._asked_at = float("-inf")
        _log.warning("log_rejoins path=%s", disk.where(MARK))

    def hears(self, peer: Peer, message: Message) -> bool:
        """Whether the node may act on a message."""
        match message:
            case TermIs(_, number, membership):
                self._raft.members.introduce(membership)
                if number == self._number and not self._bound:
                    self._answers[str(peer.id)] = message
                    self._bind()
                return False
            case Append() | Chunk() | HigherTerm() | AskTerm():
                return self._bound
            case (
                RequestVote() | Vote() | PreVote() | PreVoteReply() | TimeoutNow() | Ack()
            ):  # fmt: skip
                return False
            case _:
                assert_never(message)

    def tick(self) -> bool:
        """Ask who has not answered; True once the node is a voter again."""
        if not self._bound:
            self._ask()
            return False
        raft = self._raft
        entry = raft.journal.entry(raft.commit_index)
        if entry is None or entry.term != raft.term:
            return False
        raft.journal.sync()
        try:
            self._disk.remove(MARK)
            self._disk.sync_folder()
        except OSError as error:
            path = self._disk.where(MARK)
            raise DiskFailed("the log's folder cannot be written", error, path) from error
        _log.warning("log_rejoined index=%d term=%d", entry.index, raft.term)
        return True

    def _ask(self) -> None:
        raft, now = self._raft, pinned.now()
        if now - self._asked_at < ASK_S:
            return
        self._asked_at = now
        for peer in sorted(raft.connected_peers, key=lambda each: str(each.id)):
            raft.transport.transmit(peer, AskTerm(raft.term, self._number))

    def _bind(self) -> None:
        raft = self._raft
        if self._answers.keys() >= self._whom():
            raft.spend_vote(max(raft.term, *(each.term for each in self._answers.values())) + 1)
            self._bound = True

    def _whom(self) -> set[str]:
        """Everybody whose answer counts: in the newest configuration, or known to one who is."""
        known = [self._raft.members.known_last]
        known += [each.membership for each in self._answers.values()]
        newest = max(known, key=lambda each: each.index)
        members = {each.name for each in newest.everyone}
        for name in members & self._answers.keys():
            members |= {each.name for each in self._answers[name].membership.everyone}
        return members - {self._raft.members.me}
