"""The parent's side of reading: children with deadlines, and one typed finding for each look.

A poll costs a message to a child that lives on; only a head that moved costs a child of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from types import TracebackType
from typing import assert_never

import msgspec
import structlog

import reconciler
from reconciler.git.fetch import LENGTH, MAX_POLLS, Job, Mode, Reply, frame
from reconciler.git.findings import (
    Answer,
    Bounds,
    Commit,
    Found,
    Head,
    Missing,
    Refused,
    Target,
    Unchanged,
    Unreachable,
)
from reconciler.git.location import Credentials, Location

log = structlog.get_logger("mill.git")

DEFAULT_DEADLINE_S = 60.0
MAX_FETCHES = 2
"""At a time: each may take the whole memory bound."""

REAP_S = 5.0
"""A killed child that hangs in the kernel (a dead network disk) is left behind after this."""

_KEPT_ENV = ("PATH", "https_proxy", "http_proxy", "all_proxy", "no_proxy",
             "SSL_CERT_FILE", "SSL_CERT_DIR")
_START = ("import sys; sys.path.insert(0, sys.argv[1]); from reconciler.git.fetch import main; "
          "main(sys.argv[2], *map(int, sys.argv[3:]))")


class ReaderGone(Exception):
    """The child ended before it answered."""


class Poller:
    """Looks at repositories. Use as `async with Poller() as poller`; leaving kills the children."""

    def __init__(self, bounds: Bounds | None = None) -> None:
        self._bounds = bounds or Bounds()
        self._heads = _HeadReader(self._bounds)
        self._fetches = asyncio.Semaphore(MAX_FETCHES)
        self._polls = asyncio.Semaphore(MAX_POLLS)

    async def __aenter__(self) -> Poller:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._heads.end()

    async def look(
        self, location: Location, branch: str, path: str, last: str, *,
        credentials: Credentials | None = None, deadline_s: float = DEFAULT_DEADLINE_S,
    ) -> Found:
        """What stands at the head of `branch`; `Unchanged` where that is the commit `last`.

        Never raises for what a repository does. `deadline_s` bounds the whole, waiting for
        other looks aside.
        """
        target = Target(location=location, branch=branch, path=path, credentials=credentials)
        loop = asyncio.get_running_loop()
        async with self._polls:
            started = loop.time()
            head = await self._head(target, min(self._bounds.head_s, deadline_s))
        left_s = deadline_s - (loop.time() - started)
        match head:
            case Head(sha):
                if sha == last:
                    return Unchanged(sha)
            case Missing() | Unreachable():
                return head
            case _:
                raise AssertionError(f"a poll cannot find {type(head).__name__}")
        async with self._fetches:
            found = await self._commit(target, max(left_s, 1.0))
        match found:
            case Refused(reason, ""):
                return Refused(reason, head.sha)  # named, so that it is not read again each poll
            case Commit() | Missing() | Unreachable() | Refused():
                return found
            case Head():
                raise AssertionError("a fetch cannot find a bare head")
            case _:
                assert_never(found)

    async def _head(self, target: Target, deadline_s: float) -> Answer:
        """From the child that lives on; where another poll took it down, from a fresh one."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            return await self._heads.ask(target, deadline_s)
        except ReaderGone:
            left_s = max(deadline_s - (loop.time() - started), 1.0)
            return await _ask_once("heads", target, self._bounds, left_s)

    async def _commit(self, target: Target, deadline_s: float) -> Answer:
        return await _ask_once("commit", target, self._bounds, deadline_s)


class _HeadReader:
    """The child that answers polls: started when first asked, killed whole when one poll hangs."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._child: asyncio.subprocess.Process | None = None
        self._listener: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._number = 0
        self._starting = asyncio.Lock()

    async def ask(self, target: Target, deadline_s: float) -> Answer:
        """The head of a branch; Unreachable past the deadline, ReaderGone where the child ended."""
        async with self._starting:
            child = await self._running()
        assert child.stdin is not None
        self._number += 1
        number = self._number
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            async with asyncio.timeout(deadline_s):
                child.stdin.write(frame(Job(number, target, self._bounds)))
                await child.stdin.drain()
                return await answer
        except TimeoutError:
            await _end(child)
            return _too_slow(target)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ReaderGone from error
        finally:
            self._waiting.pop(number, None)

    async def end(self) -> None:
        """Kill the child, if there is one."""
        if self._child is not None:
            await _end(self._child)
        await self._stop_listening()

    async def _running(self) -> asyncio.subprocess.Process:
        if self._child is not None and self._child.returncode is None and self._listener \
                and not self._listener.done():
            return self._child
        if self._child is not None:
            await _end(self._child)
            await self._stop_listening()
        self._child = await _start("heads", self._bounds, cpu_s=0, alarm_s=0)
        self._listener = asyncio.create_task(self._listen(self._child), name="git-heads")
        return self._child

    async def _listen(self, child: asyncio.subprocess.Process) -> None:
        """Hand out answers until the child ends, then tell those who still wait."""
        try:
            while True:
                reply = await _next_reply(child, self._bounds)
                waiting = self._waiting.get(reply.number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(reply.answer)
        except ReaderGone:
            self._give_up()

    async def _stop_listening(self) -> None:
        """Before another child is asked: what the old one still owes will never come."""
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
        self._give_up()

    def _give_up(self) -> None:
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ReaderGone())


async def _ask_once(mode: Mode, target: Target, bounds: Bounds, deadline_s: float) -> Answer:
    """One question to a child of its own, which is gone when this returns or is cancelled."""
    child = await _start(mode, bounds, cpu_s=bounds.cpu_s, alarm_s=int(deadline_s) + 5)
    assert child.stdin is not None
    try:
        async with asyncio.timeout(deadline_s):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                child.stdin.write(frame(Job(0, target, bounds)))
                await child.stdin.drain()
            return (await _next_reply(child, bounds)).answer
    except TimeoutError:
        return _too_slow(target)
    except ReaderGone:
        await _end(child)
        log.warning("git_reader_died", at=target.location.shown, code=child.returncode)
        return Unreachable(f"reading {target.location.shown} takes more memory or processor time "
                           "than a look may")
    finally:
        await _end(child)


async def _start(
    mode: Mode, bounds: Bounds, *, cpu_s: int, alarm_s: int
) -> asyncio.subprocess.Process:
    root = str(Path(reconciler.__file__).parent.parent)
    env = {name: os.environ[name] for name in _KEPT_ENV if name in os.environ}
    # One arena a core, as malloc likes it, would eat the address space that the limit allows.
    env |= {"LC_ALL": "C.UTF-8", "HOME": "/nonexistent", "MALLOC_ARENA_MAX": "2"}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-c", _START, root, mode,
        str(bounds.memory_bytes), str(cpu_s), str(alarm_s),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL, env=env, cwd="/", start_new_session=True,
    )


async def _next_reply(child: asyncio.subprocess.Process, bounds: Bounds) -> Reply:
    """The next answer; ReaderGone at the end of the pipe, or for what is not an answer."""
    assert child.stdout is not None
    most = 2 * bounds.total_bytes + bounds.files * 8 * 1024
    try:
        (size,) = LENGTH.unpack(await child.stdout.readexactly(LENGTH.size))
        if size > most:
            raise ReaderGone(f"an answer of {size} bytes")
        return msgspec.msgpack.decode(await child.stdout.readexactly(size), type=Reply)
    except (asyncio.IncompleteReadError, ConnectionResetError, msgspec.DecodeError) as error:
        raise ReaderGone from error


async def _end(child: asyncio.subprocess.Process) -> None:
    """Kill the child's whole session and reap it. Safe to repeat."""
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    assert child.stdin is not None
    child.stdin.close()
    try:
        await asyncio.wait_for(child.wait(), REAP_S)
    except TimeoutError:
        log.warning("git_reader_stuck", pid=child.pid)


def _too_slow(target: Target) -> Unreachable:
    # No figure: what is left of a deadline differs each time, and the reason must not.
    return Unreachable(f"{target.location.shown} does not finish its answer in time")
