"""The agent's door to its allocations' output: attach containers, read what they said.

The writing is done by a process of its own (`logwriter.py`), which outlives the agent. Reading
needs only the files (`logfile.py`), so it works while that process is away.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

import reconciler
from reconciler.errors import MillError
from reconciler.executor.agent import logwriter
from reconciler.executor.agent.logfile import Follower, LogLine, tail

__all__ = ["LogLine", "LogStore", "LogsFailed"]

START_DEADLINE_S = 20.0  # a cold interpreter on a busy machine
ANSWER_DEADLINE_S = 10.0
RETRY_S = 0.02
FOLLOW_S = 0.1  # how late a follower may be
TAIL_LINES = 100_000  # 3 x 10 MB of output hold more; no person reads them

_ALLOCATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")


class LogsFailed(MillError):
    """The log process cannot be started or refused; `at` is its folder."""


class LogStore:
    """The logs of one node, in `folder` (made, root-only). One a node process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._starting = asyncio.Lock()
        # Our own hold on each fifo: what a container said last is kept in the pipe even when the
        # log process is killed and the container ends before it is back.
        self._held: dict[str, list[int]] = {}

    async def ensure_running(self) -> None:
        """Start the log process unless it answers; it takes up every attached fifo by itself.

        Errors: LogsFailed with the reason.
        """
        async with self._starting:
            deadline = time.monotonic() + START_DEADLINE_S
            while not await asyncio.to_thread(self._answers):
                if time.monotonic() > deadline:
                    raise LogsFailed("the log process does not answer", at=str(self._folder))
                await self._start()
                await asyncio.sleep(RETRY_S)

    async def attach(self, alloc: str) -> tuple[str, str]:
        """The paths of the allocation's stdout and stderr fifos, both open for reading.

        May be repeated; a restart of the container in place needs no new call.
        """
        await self._do(logwriter.Attach(_checked(alloc)))
        paths = [logwriter.fifo(self._folder, alloc, stream) for stream in logwriter.STREAMS]
        if alloc not in self._held:
            flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
            self._held[alloc] = [os.open(path, flags) for path in paths]
        return str(paths[0]), str(paths[1])

    async def detach(self, alloc: str) -> None:
        """After the container's end: read its output to the end and remove the fifos."""
        await self._do(logwriter.Detach(_checked(alloc)))
        self._let_go(alloc)

    async def remove(self, alloc: str) -> None:
        """Delete the allocation's log; nothing there is fine."""
        await self._do(logwriter.Remove(_checked(alloc)))
        self._let_go(alloc)

    def folders(self) -> list[str]:
        """The allocations that have a log here, sorted."""
        return sorted(
            p.name
            for p in self._folder.iterdir()
            if _ALLOCATION.fullmatch(p.name) and (p / "current").exists()
        )

    async def tail(self, alloc: str, lines: int) -> list[LogLine]:
        """The last `lines` lines, oldest first; none of an allocation without a log."""
        count = min(lines, TAIL_LINES)
        return await asyncio.to_thread(tail, self._folder / _checked(alloc), count)

    async def follow(self, alloc: str, after: str = "") -> AsyncIterator[LogLine]:
        """Every line whose `ts` is later than `after`, as they come, until the log has ended.

        It has ended when the allocation is detached or removed, or was never attached.
        """
        folder = self._folder / _checked(alloc)
        follower = Follower(folder, after)
        try:
            while True:
                # Looked at first: what is in the files after the fifo went is all there will be.
                ended = not logwriter.fifo(self._folder, alloc, logwriter.STREAMS[0]).exists()
                lines = await asyncio.to_thread(follower.read)
                for line in lines:
                    yield line
                if not lines:
                    if ended:
                        return
                    await asyncio.sleep(FOLLOW_S)
        finally:
            follower.close()

    async def stop(self) -> None:
        """End the log process and wait until it is gone; the logs stay. Not running is fine."""
        for alloc in list(self._held):
            self._let_go(alloc)
        await asyncio.to_thread(self._ask_to_end)

    async def _do(self, request: logwriter.Request) -> None:
        try:
            reply = await asyncio.to_thread(self._ask, request)
        except OSError:  # not running, or killed in the middle: every request may be repeated
            await self.ensure_running()
            try:
                reply = await asyncio.to_thread(self._ask, request)
            except OSError as error:
                raise LogsFailed(f"log process: {error}", at=str(self._folder)) from error
        if reply.error:
            raise LogsFailed(f"log process: {reply.error}", at=str(self._folder))

    def _answers(self) -> bool:
        try:
            return not self._ask(logwriter.Ping()).error
        except OSError:
            return False

    def _ask_to_end(self) -> None:
        with suppress(OSError), self._connected() as control:
            control.send(msgspec.msgpack.encode(logwriter.Stop()))
            while control.recv(logwriter.REQUEST_BYTES):
                pass  # the reply, then the end of the connection
        lock = self._folder / logwriter.LOCK
        if not lock.exists():
            return
        file = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        try:
            _wait_for_lock(file, lock)
        finally:
            os.close(file)

    def _ask(self, request: logwriter.Request) -> logwriter.Reply:
        with self._connected() as control:
            control.send(msgspec.msgpack.encode(request))
            answer = control.recv(logwriter.REQUEST_BYTES)
        if not answer:
            raise ConnectionResetError("the log process ended before it answered")
        return msgspec.msgpack.decode(answer, type=logwriter.Reply)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        home = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
                control.settimeout(ANSWER_DEADLINE_S)
                control.connect(f"/proc/self/fd/{home}/{logwriter.CONTROL}")
                yield control
        finally:
            os.close(home)

    async def _start(self) -> None:
        root = Path(reconciler.__file__).parents[1]
        path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            logwriter.__name__,
            env={**os.environ, logwriter.FOLDER_VARIABLE: str(self._folder), "PYTHONPATH": path},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                _, told = await process.communicate()
        except TimeoutError as error:
            process.kill()
            await process.wait()
            raise LogsFailed("the log process does not start", at=str(self._folder)) from error
        if process.returncode:
            why = told.decode(errors="replace").strip().splitlines() or ["no reason given"]
            raise LogsFailed(f"the log process does not start: {why[-1]}", at=str(self._folder))

    def _let_go(self, alloc: str) -> None:
        for pipe in self._held.pop(alloc, []):
            os.close(pipe)


def _checked(alloc: str) -> str:
    if not _ALLOCATION.fullmatch(alloc):
        raise ValueError(f"allocation {alloc!r}: not a name for a folder")
    return alloc


def _wait_for_lock(file: int, path: Path) -> None:
    deadline = time.monotonic() + ANSWER_DEADLINE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise LogsFailed("the log process does not end", at=str(path)) from error
            time.sleep(RETRY_S)
