"""The door to pysyncobj: exactly the version that was read line by line, with pickle bolted.

`hardening.Raft` overrides and reads private names of this version. Importing this module
checks that each of them exists and switches off what must never run: pickle (a peer's
first frame would be code), the file journal, the fork, the pipe.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import NoReturn

import pysyncobj.journal
import pysyncobj.pickle
import pysyncobj.serializer
import pysyncobj.syncobj
import pysyncobj.tcp_connection
import pysyncobj.version

VERSION = "0.3.17"

OVERRIDDEN = (
    "_SyncObj__applyLogEntries",
    "_SyncObj__connectedToAnyone",
    "_SyncObj__doApplyCommand",
    "_SyncObj__loadDumpFile",
    "_SyncObj__onBecomeLeader",
    "_SyncObj__parseChangeClusterRequest",
    "_SyncObj__sendAppendEntries",
    "_SyncObj__setState",
    "_SyncObj__tryLogCompaction",
    "_applyCommand",
    "_checkCommandsToApply",
    "doTick",
)
CALLED = (
    "_SyncObj__generateRaftTimeout",
    "_SyncObj__onMessageReceived",
    "_SyncObj__setCurrentTerm",
    "_onTick",
    "addOnTickCallback",
)
FIELDS = (
    "_SyncObj__connectedNodes",
    "_SyncObj__lastResponseTime",
    "_SyncObj__newAppendEntriesTime",
    "_SyncObj__noopIDx",
    "_SyncObj__otherNodes",
    "_SyncObj__raftCommitIndex",
    "_SyncObj__raftCurrentTerm",
    "_SyncObj__raftElectionDeadline",
    "_SyncObj__raftLastApplied",
    "_SyncObj__raftLeader",
    "_SyncObj__raftMatchIndex",
    "_SyncObj__raftNextIndex",
    "_SyncObj__raftState",
    "_SyncObj__transferInProgress",
)


class Unpinned(ImportError):
    """The installed pysyncobj is not the one that this package was written against."""


class PickleReached(AssertionError):
    """A path that must be unreachable was reached; nothing was loaded."""


class _NoPickle:
    """In the place of the pickle module: any use of it raises."""

    def __getattr__(self, name: str) -> NoReturn:
        raise PickleReached(f"pickle.{name} must not be reachable in the log")


def _refuse(*_arguments: object, **_options: object) -> NoReturn:
    raise PickleReached("pickle must not be reachable in the log")


def check(version: str, methods: dict[str, object], fields: frozenset[str]) -> None:
    """Raise Unpinned unless the version and every name are as expected."""
    if version != VERSION:
        raise Unpinned(f"pysyncobj {version} is installed; the log is hardened for {VERSION} only")
    missing = [name for name in (*OVERRIDDEN, *CALLED) if name not in methods]
    missing += [name for name in FIELDS if name not in fields]
    if missing:
        raise Unpinned(f"pysyncobj {version} lacks {', '.join(missing)}")


def use_time(monotonic: Callable[[], float], rng: random.Random) -> None:
    """Give pysyncobj a clock (seconds) and a source of election timeouts; for simulation."""
    pysyncobj.syncobj.monotonicTime = monotonic
    pysyncobj.syncobj.random = rng


def now() -> float:
    """The clock that pysyncobj uses, in seconds."""
    return float(pysyncobj.syncobj.monotonicTime())


def _bolt() -> None:
    stand_in = _NoPickle()
    for module in (pysyncobj.syncobj, pysyncobj.tcp_connection, pysyncobj.serializer):
        module.pickle = stand_in
    for module in (pysyncobj.pickle, pysyncobj.journal):
        for name in ("load", "loads", "dump", "dumps"):
            if hasattr(module, name):
                setattr(module, name, _refuse)
    # These take the object that the configuration carries instead of making one of their own.
    pysyncobj.syncobj.createJournal = lambda journal: journal
    pysyncobj.syncobj.createPoller = lambda poller: poller
    pysyncobj.syncobj.PIPE_NOTIFIER_ENABLED = False
    use_time(time.monotonic, random.Random())  # noqa: S311  # spreads timeouts, guards nothing


_SyncObj = pysyncobj.syncobj.SyncObj
check(
    pysyncobj.version.VERSION,
    vars(_SyncObj),
    frozenset(_SyncObj.__init__.__code__.co_names),
)
_bolt()
