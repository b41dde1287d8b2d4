"""The raft thread and what it owns: files, sockets, the Raft core, and its ways in and out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from reconciler.errors import MillError
from reconciler.log.archive import Archive, Past
from reconciler.log.configuration import Change, Progress
from reconciler.log.disk import Disk, OsDisk
from reconciler.log.errors import LogFailed, NotLeader, OutcomeUnknown
from reconciler.log.handover import HandedOver
from reconciler.log.hardening import Parts, ProposalDone, Raft
from reconciler.log.poller import EpollPoller
from reconciler.log.reads import ReadDone
from reconciler.log.reopening import reopen
from reconciler.log.settings import Machine, Membership, Settings
from reconciler.log.snapshot import Snapshots
from reconciler.log.transport import TlsTransport

STOP_S = 10.0  # the raft thread's last tick may be in the middle of a slow sync

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class HeldDisk(Disk, Protocol):
    """A disk that nobody else has until it is closed."""

    def close(self) -> None:
        """Let another have it."""
        ...


OpenDisk = Callable[[Path], HeldDisk]


@dataclass(frozen=True)
class Status:
    """What the raft thread last said of itself; replaced as a whole, so any thread may read."""

    membership: Membership
    leading: bool = False
    leader: str | None = None
    term: int = 0
    applied_index: int = 0


@dataclass(frozen=True)
class News:
    """What one or more ticks brought: for the loop, as one."""

    status: Status
    answers: list[Callable[[], None]]
    leadership: list[tuple[bool, int]]
    fatal: BaseException | None


class Engine:
    """The raft thread and what it owns; implements `hardening.Listener`.

    Raises LogDamaged, DiskFailed, or LogFailed where the address or the folder is taken.
    """

    def __init__(
        self,
        settings: Settings,
        machine: Machine,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[News], None],
        open_disk: OpenDisk = OsDisk,
    ) -> None:
        self.loop, self._deliver = loop, deliver
        self._tick_s = settings.timing.tick_s
        self._answers: list[Callable[[], None]] = []
        self._leadership: list[tuple[bool, int]] = []
        self._ready: deque[News] = deque()
        self._leading = False
        self._fatal: BaseException | None = None
        self._told = Status(Membership(settings.members))
        self._scheduled = False
        self._stop = False
        self._ended = False
        with contextlib.ExitStack() as undo:
            self._disk = open_disk(settings.folder)
            undo.callback(self._disk.close)
            self._journal = reopen(self._disk)
            undo.callback(self._journal.abandon)
            self._poller = EpollPoller()
            undo.callback(self._poller.close)
            self._transport = transport = TlsTransport(settings, self._poller)
            undo.callback(transport.destroy)
            self._archive = Archive(settings.folder, time.time)
            parts = Parts(
                self._journal, Snapshots(self._disk), machine, transport, self._poller, self,
                self._disk, self._archive,
            )
            self.raft = Raft(
                settings.me.name, settings.members, parts, settings.timing,
                settings.snapshot_bytes,
            )
            self.raft.addOnTickCallback(transport.tick)
            undo.pop_all()
        name = f"log-{settings.me.name}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to tick."""
        self._thread.start()

    def propose(self, command: bytes, done: ProposalDone) -> None:
        """Queue a command and wake the raft thread."""
        self.raft.propose(command, done)
        self._poller.wake()
        if self._ended:
            raise OutcomeUnknown("this node's log stopped")

    def ask(self, done: ReadDone) -> None:
        """Queue a read and wake the raft thread."""
        self.raft.reads.ask(done)
        self._poller.wake()
        if self._ended:
            raise NotLeader

    def change(self, change: Change, done: ProposalDone) -> None:
        """Queue a change of the members and wake the raft thread."""
        self.raft.members.ask(change, done)
        self._poller.wake()
        if self._ended:
            raise NotLeader

    def hand_over(self, to: str | None, done: HandedOver) -> None:
        """Ask the raft thread to hand leadership over."""
        self.raft.hand_over(to, done)
        self._poller.wake()
        if self._ended:
            raise NotLeader

    def is_followed(self) -> bool:
        """In any thread: as `Members.is_followed`."""
        return self.raft.members.is_followed()

    def progress(self) -> dict[str, Progress]:
        """Of the other members, where this node leads."""
        return self.raft.members.progress()

    def reload_identity(self) -> None:
        """Use the certificate and key that lie there now."""
        self._transport.reload_identity()

    def stop(self) -> None:
        """Blocking: end the thread and close what it owned."""
        self._stop = True
        if self._thread.is_alive():
            self._poller.wake()
            self._thread.join(STOP_S)
        if self._thread.is_alive():
            raise LogFailed("the raft thread does not end", hint="the disk may hang")
        self._poller.close()
        self._disk.close()

    def past(self, index: int) -> Past:
        """Blocking, in any thread: what led to the state at an applied index; raises NotHeld."""
        return self._archive.past(index, self._journal.held())

    def status(self) -> Status:
        """A fresh view; raft thread only, or before it runs."""
        raft = self.raft
        return Status(
            raft.members.latest, self._leading, raft.leader, raft.term, raft.applied_index
        )

    def tell(self, future: asyncio.Future[_T], value: _T, error: MillError | None) -> None:
        """Settle `future` in the loop; for whoever gave up meanwhile nothing happens."""

        def settle() -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(value)

        self._answers.append(settle)

    def moved(self, applied_index: int) -> None:
        """The status says it."""

    def led(self, leading: bool, term: int) -> None:
        """Keep each change, in order."""
        self._leading = leading
        self._leadership.append((leading, term))

    def flush(self) -> None:
        """One wake-up of the loop for all that happened since its last one."""
        status = self.status()
        idle = status == self._told and not self._answers and not self._leadership
        if idle and self._fatal is None:
            return
        self._told = status
        # An answer must never be seen before the status that includes it: they go together.
        self._ready.append(News(status, self._answers, self._leadership, self._fatal))
        self._answers, self._leadership = [], []
        if not self._scheduled:
            self._scheduled = True
            # A loop that is closed has nobody left to tell.
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._hand_in)

    def _hand_in(self) -> None:
        """In the loop. Cleared first: what comes during it asks for another call."""
        self._scheduled = False
        whole = self._ready.popleft() if self._ready else None
        while whole is not None and self._ready:
            later = self._ready.popleft()
            whole = News(
                later.status,
                whole.answers + later.answers,
                whole.leadership + later.leadership,
                later.fatal,
            )
        if whole is not None:
            self._deliver(whole)

    def _run(self) -> None:
        try:
            while not self._stop:
                self.raft.doTick(self._tick_s)
            self._journal.close()
        except BaseException as error:  # noqa: BLE001  # fail-stop: handed on, and logged
            _log.critical("log_failed error=%r", error, exc_info=error)
            self._fatal = error
            self._journal.abandon()
        finally:
            self._end()

    def _end(self) -> None:
        self.raft.transport.destroy()
        self.raft.fail_waiting("this node's log stopped")
        if self._leading:
            self.led(False, self.raft.term)
        self._ended = True
        self.flush()
