"""The log process: one a node, between the containers' output and their log files.

It outlives the agent. Its whole state is its folder (environment `MILL_LOG_FOLDER`): an allocation
with fifos in `FOLDER/ALLOC` is attached, one without is not; so after a kill it goes on by itself.
It opens each fifo for reading *and* writing: then no end of a writer is an end of the stream, and
a restart in place needs nothing. The container never sees a broken pipe while this process is
away, because the shim holds a reading end of its own; it waits once the pipe is full.

Requests come over the unix socket `FOLDER/.control`, one a connection (see `logs.py`).
"""

from __future__ import annotations

import fcntl
import os
import resource
import selectors
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import assert_never

import msgspec

from reconciler.executor.agent.logfile import LineSplitter, LogFile

FOLDER_VARIABLE = "MILL_LOG_FOLDER"
CONTROL, LOCK, TROUBLE = ".control", ".lock", ".trouble"  # no allocation's name begins with a dot
STREAMS = ("stdout", "stderr")
READ_BYTES = 128 * 1024  # a turn of one stream, so that a loud one does not hold up the others
PIPE_BYTES = 1024 * 1024  # what a container may write while this process restarts
REQUEST_BYTES = 4096
DRAIN_READS = 4 * PIPE_BYTES // READ_BYTES  # more than a pipe holds: somebody writes on and on


class Attach(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Make the allocation's fifos where they are missing, and read them from now on."""

    alloc: str


class Detach(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Read what is left in the fifos, finish the last lines, remove the fifos."""

    alloc: str


class Remove(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Forget the allocation and delete its files."""

    alloc: str


class Ping(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Answer that you are there."""


class Stop(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Finish the lines that are held back and end."""


class Reply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The answer to any request: `error` is empty where it was done."""

    error: str = ""


Request = Attach | Detach | Remove | Ping | Stop


def fifo(folder: Path, alloc: str, stream: str) -> Path:
    """Where the container's runtime writes `stream` of `alloc`."""
    return folder / alloc / f"{stream}.fifo"


class _Stream:
    """One open fifo of an allocation."""

    def __init__(self, path: Path, name: str, file: LogFile) -> None:
        with suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        self._path = path
        self._name = name.encode()
        self._file = file
        self._lines = LineSplitter()
        self.pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        with suppress(OSError):  # a host may forbid more than 64 KiB
            fcntl.fcntl(self.pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def read(self) -> bool:
        """Log what is there, at most READ_BYTES; False where there was nothing."""
        try:
            data = os.read(self.pipe, READ_BYTES)
        except BlockingIOError:
            return False
        self._append(self._lines.feed(data))
        return True

    def finish(self) -> None:
        """Log the unfinished line and close."""
        self._append(self._lines.flush())
        os.close(self.pipe)

    def drain(self) -> None:
        """Log all that the pipe holds."""
        for _ in range(DRAIN_READS):
            if not self.read():
                return

    def unlink(self) -> None:
        """Remove the fifo: nobody is attached any more."""
        self._path.unlink(missing_ok=True)

    def _append(self, lines: list[bytes]) -> None:
        if lines:
            self._file.append(self._name, lines)


class LogWriter:
    """All allocations of one folder, in one loop over ready file descriptors."""

    def __init__(self, folder: Path, control: socket.socket) -> None:
        self._folder = folder
        self._selector = selectors.DefaultSelector()
        self._attached: dict[str, tuple[LogFile, list[_Stream]]] = {}
        self._stopping = False
        self._on_ready(control, self._accept(control))
        for path in sorted(folder.glob(f"*/{STREAMS[0]}.fifo")):
            try:
                self.attach(path.parent.name)
            except OSError as error:  # one broken folder must not silence all the others
                sys.stderr.write(f"{path}: {error}\n")

    def serve(self) -> None:
        """Until told to stop; then every held back line is in its file."""
        woken, wakes = socket.socketpair()
        wakes.setblocking(False)
        signal.set_wakeup_fd(wakes.fileno())
        signal.signal(signal.SIGTERM, lambda *_: None)
        self._on_ready(woken, self.stop)
        while not self._stopping:
            for key, _ in self._selector.select():
                if self._selector.get_map().get(key.fd) is key:  # not closed in this very turn
                    key.data()
        for alloc in list(self._attached):
            self._close(alloc)

    def stop(self) -> None:
        """End the loop after this turn."""
        self._stopping = True

    def attach(self, alloc: str) -> None:
        """See Attach."""
        if alloc in self._attached:
            return
        home = self._folder / alloc
        home.mkdir(mode=0o700, exist_ok=True)
        file = LogFile(home)
        streams = [_Stream(fifo(self._folder, alloc, name), name, file) for name in STREAMS]
        self._attached[alloc] = (file, streams)
        for stream in streams:
            self._on_ready(stream.pipe, stream.read)

    def detach(self, alloc: str) -> None:
        """See Detach."""
        if alloc not in self._attached:
            return
        for stream in self._attached[alloc][1]:
            stream.drain()
        for stream in self._close(alloc):
            stream.unlink()

    def remove(self, alloc: str) -> None:
        """See Remove."""
        self._close(alloc)
        with suppress(FileNotFoundError):
            shutil.rmtree(self._folder / alloc)

    def _close(self, alloc: str) -> list[_Stream]:
        file, streams = self._attached.pop(alloc, (None, []))
        for stream in streams:
            self._selector.unregister(stream.pipe)
            stream.finish()
        if file is not None:
            file.close()
        return streams

    def _on_ready(self, what: int | socket.socket, work: Callable[[], object]) -> None:
        self._selector.register(what, selectors.EVENT_READ, work)

    def _accept(self, control: socket.socket) -> Callable[[], None]:
        def accept() -> None:
            with suppress(OSError):
                asker = control.accept()[0]
                asker.setblocking(False)
                self._on_ready(asker, lambda: self._answer(asker))

        return accept

    def _answer(self, asker: socket.socket) -> None:
        self._selector.unregister(asker)
        with asker, suppress(OSError):  # an asker that went away needs no answer
            reply = self._obey(asker.recv(REQUEST_BYTES))
            asker.send(msgspec.msgpack.encode(reply))

    def _obey(self, message: bytes) -> Reply:
        try:
            request: Request = msgspec.msgpack.decode(message, type=Request)
            match request:
                case Attach(alloc):
                    self.attach(alloc)
                case Detach(alloc):
                    self.detach(alloc)
                case Remove(alloc):
                    self.remove(alloc)
                case Ping():
                    pass
                case Stop():
                    self.stop()
                case _:
                    assert_never(request)
        except (msgspec.MsgspecError, OSError) as error:
            return Reply(str(error))
        return Reply()


def main() -> int:
    """Start detached: returns 0 in the first process once the second serves the folder.

    Also 0 where one serves it already; otherwise the reason is on standard error.
    """
    folder = Path(os.environ[FOLDER_VARIABLE])
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    control = _listen(folder)
    if os.fork():
        os._exit(0)  # the lock and the socket live on in the child
    _leave_the_terminal(folder)
    LogWriter(folder, control).serve()
    return 0


def _listen(folder: Path) -> socket.socket:
    """The control socket, bound through `/proc/self/fd`: its path may be longer than 107 bytes."""
    (folder / CONTROL).unlink(missing_ok=True)
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    home = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        control.bind(f"/proc/self/fd/{home}/{CONTROL}")
    finally:
        os.close(home)
    control.listen(64)
    control.setblocking(False)
    return control


def _leave_the_terminal(folder: Path) -> None:
    os.setsid()
    os.chdir(folder)  # tells in /proc which folder this one serves; the command line does not
    nothing = os.open(os.devnull, os.O_RDWR)
    trouble = os.open(folder / TROUBLE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for source, target in ((nothing, 0), (nothing, 1), (trouble, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(trouble)


if __name__ == "__main__":
    sys.exit(main())
