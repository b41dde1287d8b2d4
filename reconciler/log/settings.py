"""What a log's node is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Machine(Protocol):
    """The state machine that the log drives; called in the raft thread alone."""

    def apply(self, index: int, command: bytes) -> object:
        """Obey the command of entry `index`; total, must not raise.

        The result goes to the proposer on this node, if there is one, and nowhere else.
        """
        ...

    def dump(self) -> bytes:
        """The whole state; `load` of it must give the same state on every node."""
        ...

    def load(self, snapshot: bytes) -> None:
        """Take over a state in place of the present one."""
        ...

    def reset(self) -> None:
        """Begin before the first entry: at a start, and when the log opens again.

        What follows is a snapshot, or all entries from the first one on.
        """
        ...


@dataclass(frozen=True)
class Member:
    """One node of the log: its name (also in its certificate), and where its log listens."""

    name: str
    host: str
    port: int


@dataclass(frozen=True)
class Membership:
    """Who takes part in the log. Voters elect and acknowledge; learners only follow.

    `index` is that of the entry that says so; 0 for what the founding settings say.
    """

    voters: tuple[Member, ...]
    learners: tuple[Member, ...] = ()
    index: int = 0

    @property
    def everyone(self) -> tuple[Member, ...]:
        """Voters, then learners."""
        return (*self.voters, *self.learners)

    def get(self, name: str) -> Member | None:
        """The member of that name."""
        return next((each for each in self.everyone if each.name == name), None)

    def votes(self, name: str) -> bool:
        """Whether it is a voter."""
        return any(each.name == name for each in self.voters)


@dataclass(frozen=True)
class Timing:
    """Seconds. An election timeout is drawn anew from [election_min_s, election_max_s]."""

    election_min_s: float = 0.6
    election_max_s: float = 1.2
    heartbeat_s: float = 0.1
    step_down_s: float = 1.0  # a leader that no majority answers for so long lets go
    redial_s: float = 0.3
    silence_s: float = 2.0  # a connection, or a handshake, that is silent for so long is closed
    tick_s: float = 0.05  # the longest wait of the raft thread
    reopen_s: float = 5.0  # between two tries to open a log that a failing disk closed


@dataclass(frozen=True)
class Settings:
    """One node of the log.

    `members` are the founding voters, or for a node that joins the voters whom it found; what
    the log itself says takes their place. Without `me` among them this node votes for nobody
    and leads nobody until the log names it. The three files are PEM: the cluster's CA, this node's
    certificate (its name as a DNS subject alternative name), its key.
    """

    folder: Path
    me: Member
    members: tuple[Member, ...]
    ca_file: Path
    cert_file: Path
    key_file: Path
    snapshot_bytes: int = 8 << 20  # of journal since the last snapshot
    timing: Timing = Timing()

    def __post_init__(self) -> None:
        names = [member.name for member in self.members]
        assert self.members, "somebody founded the log"
        assert len(set(names)) == len(names), "members have different names"
