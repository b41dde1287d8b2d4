"""Manifests read in a child process, so that no text can slow the node that reads it.

The parent sends the files, the child parses them under limits of time and memory and answers
with the reading; both speak msgpack in frames with a length in front. `python -m
reconciler.executor.reading BYTES SECONDS` is the child with its limits: of address space, and of
its own time for one reading.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import os
import resource
import signal
import struct
import sys
from asyncio.subprocess import PIPE, Process
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import msgspec

from reconciler.errors import Unavailable
from reconciler.language.problems import Problem
from reconciler.language.read import Documents, Reading, read_manifest
from reconciler.language.source import over_bounds
from reconciler.language.spec import Manifest
from reconciler.language.warm import warm

CPU_S = 10.0  # of the child's own time, so that a busy machine refuses nothing
WAIT_S = 60.0  # of everybody's time: a child that is stopped or starved is given up
START_S = 60.0  # without the grammar's cache and on a busy machine it takes seconds
CLOSE_S = 1.0
MEMORY_BYTES = 1024**3
_CACHED = 64  # readings kept: one a source and a few manual deploys
_MAX_FRAME_BYTES = 128 * 1024**2
_LENGTH = struct.Struct(">I")
_ROOT = Path(__file__).resolve().parents[2]


class _Ask(msgspec.Struct, frozen=True):
    files: dict[str, bytes]
    variables: dict[str, str]


class Reader:
    """Reads manifests in one long-lived child; a set of files that it knows costs a hash."""

    def __init__(
        self, *, cpu_s: float = CPU_S, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self._cpu_s = cpu_s
        self._memory_bytes = memory_bytes
        self._child: Process | None = None
        self._turn = asyncio.Lock()
        self._known: OrderedDict[bytes, Reading] = OrderedDict()
        self._closed = False

    @property
    def child_pid(self) -> int | None:
        """The process that reads, if one runs."""
        child = self._child
        return child.pid if child is not None and child.returncode is None else None

    async def start(self) -> None:
        """Start the child now, with its grammar warm, rather than at the first read."""
        async with self._turn:
            await self._running()

    async def read(
        self, files: Mapping[str, bytes], variables: Mapping[str, str] | None = None
    ) -> Reading:
        """What `read_manifest` says of the files; past a limit, that as the one problem."""
        excess = over_bounds(files)
        if excess is not None:
            return Reading(Manifest(), (excess,))
        ask = _Ask(dict(sorted(files.items())), dict(sorted((variables or {}).items())))
        frame = msgspec.msgpack.encode(ask)
        digest = hashlib.sha256(frame).digest()
        known = self._recall(digest)
        if known is not None:
            return known
        async with self._turn:
            known = self._recall(digest)  # somebody may have asked the same meanwhile
            if known is not None:
                return known
            return await self._ask(digest, frame, min(files, default=""))

    async def close(self) -> None:
        """End the child; the reader cannot be used any more."""
        self._closed = True
        async with self._turn:
            await self._end()

    def _recall(self, digest: bytes) -> Reading | None:
        known = self._known.get(digest)
        if known is not None:
            self._known.move_to_end(digest)
        return known

    async def _ask(self, digest: bytes, frame: bytes, first_file: str) -> Reading:
        # A child that died since the last read (killed by hand, by the kernel) says nothing
        # about this text, so it is asked twice; one that dies of the text dies both times.
        for _ in range(2):
            child = await self._running()
            try:
                async with asyncio.timeout(WAIT_S):
                    answer = await _exchange(child, frame)
            except TimeoutError:
                await self._end()
                return _over(first_file, f"the manifest takes over {WAIT_S:g} s to read")
            except (asyncio.IncompleteReadError, OSError):
                if await self._end() == -signal.SIGPROF:
                    return _over(first_file, f"the manifest takes over {self._cpu_s:g} s to read")
                continue
            except BaseException:
                await self._end()  # half an answer would be taken for the next one
                raise
            reading = msgspec.msgpack.decode(answer, type=Reading)
            self._known[digest] = reading
            while len(self._known) > _CACHED:
                self._known.popitem(last=False)
            return reading
        mebibytes = self._memory_bytes // 1024**2
        return _over(first_file, f"the manifest takes over {mebibytes} MiB of memory to read")

    async def _running(self) -> Process:
        if self._closed:
            raise Unavailable("the reader of manifests is closed")
        if self._child is not None and self._child.returncode is None:
            return self._child
        await self._end()
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
        child = self._child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "reconciler.executor.reading", str(self._memory_bytes),
            str(self._cpu_s),
            stdin=PIPE, stdout=PIPE, env={**os.environ, "PYTHONPATH": path},
        )
        try:
            async with asyncio.timeout(START_S):
                await _receive(child)
        except (TimeoutError, asyncio.IncompleteReadError, OSError) as error:
            await self._end()
            raise Unavailable("the process that reads manifests does not start",
                              hint="see the node's log for its error") from error
        except BaseException:
            await self._end()
            raise
        return child

    async def _end(self) -> int | None:
        """End the child; what it ended with, if that is known."""
        child, self._child = self._child, None
        if child is None:
            return None
        if child.stdin is not None:
            child.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                return await child.wait()  # it ends by itself when nobody asks any more
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        return await child.wait()


def _over(file: str, message: str) -> Reading:
    return Reading(Manifest(), (Problem(file, 1, 1, message, "split it into several sources"),))


async def _exchange(child: Process, frame: bytes) -> bytes:
    assert child.stdin is not None
    child.stdin.write(_LENGTH.pack(len(frame)) + frame)
    await child.stdin.drain()
    return await _receive(child)


async def _receive(child: Process) -> bytes:
    assert child.stdout is not None
    (length,) = _LENGTH.unpack(await child.stdout.readexactly(_LENGTH.size))
    if length > _MAX_FRAME_BYTES:
        raise OSError(f"a frame of {length} bytes")
    return await child.stdout.readexactly(length)


def serve(asks: BinaryIO, answers: BinaryIO, cpu_s: float) -> None:
    """The child's whole life: say that it is warm, then one answer for each ask, until the end."""
    warm()
    gc.freeze()  # the grammar's tables stay; a collection need not walk them
    _send(answers, b"")
    documents = Documents()
    while head := asks.read(_LENGTH.size):
        frame = asks.read(_LENGTH.unpack(head)[0])
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # its signal ends the process
        ask = msgspec.msgpack.decode(frame, type=_Ask)
        gc.disable()  # a third of the time of a large parse; the limit on memory stands
        reading = read_manifest(ask.files, ask.variables, documents)
        gc.enable()
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(answers, msgspec.msgpack.encode(reading))


def _send(answers: BinaryIO, frame: bytes) -> None:
    answers.write(_LENGTH.pack(len(frame)) + frame)
    answers.flush()


def _main() -> None:
    memory_bytes = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's to handle
    try:
        serve(sys.stdin.buffer, sys.stdout.buffer, float(sys.argv[2]))
    except (MemoryError, BrokenPipeError):
        os._exit(1)  # not a flush or a handler more: there is no memory, or nobody there


if __name__ == "__main__":
    _main()
