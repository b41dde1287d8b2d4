"""The reading child: a process that may be killed at any moment, and holds nothing but memory.

`heads` answers many polls, each in a thread of its own; `commit` reads one commit and ends. Jobs
come on standard input and answers leave on standard output, each a msgpack document behind its
length in four bytes, so that no credential is in an argument list or an environment.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys
import threading
from typing import BinaryIO, Literal

import msgspec

from reconciler.git.findings import Answer, Bounds, Target, Unreachable

Mode = Literal["heads", "commit"]

MAX_JOB_BYTES = 64 * 1024
MAX_POLLS = 16
"""Polls at a time; the parent keeps to it, so that threads here stay bounded."""

LENGTH = struct.Struct(">I")
_STACK_BYTES = 1 << 20


class Job(msgspec.Struct, frozen=True):
    """One question; its answer carries the same number."""

    number: int
    target: Target
    bounds: Bounds


class Reply(msgspec.Struct, frozen=True):
    """The answer to the job of that number."""

    number: int
    answer: Answer


def frame(document: Job | Reply) -> bytes:
    """A document behind its length."""
    data = msgspec.msgpack.encode(document)
    return LENGTH.pack(len(data)) + data


def main(mode: Mode, memory_bytes: int, cpu_s: int, alarm_s: int) -> None:
    """Run as a child. The limits stand before the first byte from outside is looked at.

    `cpu_s` and `alarm_s` 0 set no such limit: a child that answers polls lives on.
    """
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if cpu_s:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    signal.alarm(alarm_s)  # a parent that was killed cannot kill: then the child ends by itself
    threading.stack_size(_STACK_BYTES)  # the default of 8 MiB counts against the memory limit
    if mode == "heads":
        _serve_heads(sys.stdin.buffer, sys.stdout.buffer)
    else:
        job = _next_job(sys.stdin.buffer)
        if job is not None:
            _answer(job, mode, sys.stdout.buffer, threading.Lock())
    os._exit(0)  # not sys.exit: threads that hang in a read must not hold the process


def _serve_heads(jobs: BinaryIO, replies: BinaryIO) -> None:
    lock = threading.Lock()
    while (job := _next_job(jobs)) is not None:
        threading.Thread(target=_answer, args=(job, "heads", replies, lock), daemon=True).start()


def _next_job(jobs: BinaryIO) -> Job | None:
    """The next question; None once the parent has closed the pipe, or died."""
    head = jobs.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(head)
    assert size <= MAX_JOB_BYTES, "the parent sends small jobs only"
    return msgspec.msgpack.decode(jobs.read(size), type=Job)


def _answer(job: Job, mode: Mode, replies: BinaryIO, lock: threading.Lock) -> None:
    try:
        # Here, so that what is wrong with an installation is an answer and not a silent death.
        from reconciler.git import remote

        answer = (remote.read_head(job.target) if mode == "heads"
                  else remote.read_commit(job.target, job.bounds))
    except MemoryError:
        os._exit(3)  # the other threads may have been hit too: all are asked again elsewhere
    except Exception as error:  # noqa: BLE001  told, so that the parent can log it
        answer = Unreachable(f"the reading child broke: {type(error).__name__}: {error}"[:300])
    data = frame(Reply(job.number, answer))
    with lock:
        replies.write(data)
        replies.flush()
