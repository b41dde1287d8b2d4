"""What can go wrong in the log, as callers and operators see it."""

from __future__ import annotations

from reconciler.errors import Conflict, MillError, Unavailable, Unprocessable

AGAIN = "the cluster elects a new leader within seconds; try again"
SHORTLY = "try again in a moment; `mill nodes` says who is up and who follows"
CHECK = "it may or may not have happened: look before you repeat it"
FREE = "free the disk or replace it; the log opens again by itself within seconds"
REBUILD = (
    "this node's copy cannot be trusted, its peers hold the data: start its agent once with "
    "--rejoin, which moves the log aside and brings it back from them"
)


class NotLeader(Unavailable):
    """This node does not lead; nothing was written. `leader` names who does, if known."""

    unwritten = True

    def __init__(self, leader: str | None = None) -> None:
        super().__init__(
            f"this node does not lead the log; {leader} does" if leader else "no leader is known",
            hint=f"ask {leader}" if leader else AGAIN,
        )
        self.leader = leader


class OutcomeUnknown(Unavailable):
    """The command was taken, but this node cannot say whether it was committed."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the outcome is unknown: {why}", hint=CHECK)


class NoMajority(Unavailable):
    """The leader could not confirm in time that it still leads; nothing was read."""

    def __init__(self, why: str) -> None:
        super().__init__(f"no majority of the log's nodes answered: {why}", hint=AGAIN)


class LogBusy(Unavailable):
    """Too much is queued; nothing was written."""

    def __init__(self, under_way: int) -> None:
        super().__init__(f"the log is busy with {under_way} requests", hint="try again in a moment")


class ChangeUnderWay(Conflict):
    """One change of the members at a time; nothing was written."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the log's members cannot change now: {why}", hint=SHORTLY)


class NotCaughtUp(Conflict):
    """A learner lacks too much or is not heard, so its vote would hinder; nothing was written."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name} cannot vote yet: {why}", hint=SHORTLY)


class NobodyTakesOver(Conflict):
    """No voter could take the leadership in time; this node still leads."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the leadership cannot be handed over: {why}", hint=SHORTLY)


class LogFailed(Unavailable):
    """The log of this node stopped: a failed write, or a broken promise of Raft."""


class DiskFailed(LogFailed):
    """A write, sync or read failed: what the disk holds is unknown until it is read anew."""

    def __init__(self, what: str, error: OSError, path: str) -> None:
        self.reason = error.strerror or str(error)
        super().__init__(f"{what}: {self.reason}", at=path, hint=FREE)


class LogClosed(Unavailable):
    """This node's log is closed until its disk can be written again; nothing was written."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the log of this node is closed: {reason}", hint=FREE)


class CommandTooLarge(Unprocessable):
    """The command does not fit into one log entry; nothing was written."""

    status = 413

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"a command of {size_bytes} bytes is over the log's limit of {limit_bytes}",
            hint="split the manifest, or keep large content out of it",
        )


class LogDamaged(MillError):
    """What is on disk is not what was written; `at` says the file and the byte."""

    def __init__(self, what: str, path: str, offset_bytes: int) -> None:
        super().__init__(what, at=f"{path}, byte {offset_bytes}", hint=REBUILD)
        self.path = path
        self.offset_bytes = offset_bytes
