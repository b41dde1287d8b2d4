"""Reading through the child process: limits, its death, and what is known already."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path

import pytest

from reconciler.errors import Unavailable
from reconciler.executor.reading import Reader
from reconciler.language.read import read_manifest
from tests.language.manifests import SEED

FILES = {"app.mill": SEED.encode()}
COSTLY = {f"{n}.mill": b'service "s" { a = 1' + b"+1" * 25_000 + b" }" for n in range(6)}


@pytest.fixture
async def reader():
    made = Reader()
    yield made
    await made.close()


async def test_the_child_reads_as_the_parent_would(reader):
    broken = {"a.mill": b"a =", "b.mill": b'service "x" { prt = 1 }\n'}
    assert await reader.read(FILES) == read_manifest(FILES)
    assert await reader.read(broken) == read_manifest(broken)
    varied = {"a.mill": b'variables { v = "1" }\nservice "s" { image = "i:${var.v}" }'}
    assert await reader.read(varied, {"v": "2"}) == read_manifest(varied, {"v": "2"})
    assert await reader.read(varied, {"v": "3"}) == read_manifest(varied, {"v": "3"})


async def test_files_that_have_not_changed_are_not_read_again(reader):
    first = await reader.read(FILES)
    pid = reader.child_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # a child that cannot answer is not asked
    try:
        assert await reader.read(dict(FILES)) is first
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_the_death_of_the_child_is_survived(reader):
    await reader.start()
    pid = reader.child_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert (await reader.read(FILES)).problems == ()
    assert reader.child_pid not in {None, pid}


async def test_a_reading_that_takes_too_long_is_a_problem_and_the_next_one_works():
    reader = Reader(cpu_s=0.3)
    try:
        reading = await reader.read(COSTLY)
        assert [found.message for found in reading.problems] == [
            "the manifest takes over 0.3 s to read"]
        assert (await reader.read(FILES)).problems == ()
    finally:
        await reader.close()


def peak_bytes(pid: int | None) -> int:
    """The most address space that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmPeak:\s*(\d+) kB", status)[0]) * 1024


async def test_a_reading_that_takes_too_much_memory_is_a_problem_and_the_next_one_works(reader):
    await reader.start()
    tight = Reader(memory_bytes=peak_bytes(reader.child_pid) + 6 * 1024**2, cpu_s=3)
    try:
        reading = await tight.read(COSTLY)
        # Just below its limit a process may crawl before it fails: then time ends it first.
        assert len(reading.problems) == 1
        assert reading.problems[0].message.startswith("the manifest takes over ")
        assert (await tight.read(FILES)).problems == ()
    finally:
        await tight.close()


async def test_what_is_over_the_bounds_never_reaches_the_child(reader):
    reading = await reader.read({"a.mill": b"x" * 10_000_000})
    assert "over 256 KiB" in reading.problems[0].message
    assert reader.child_pid is None


async def test_a_cancelled_reading_leaves_no_answer_for_the_next(reader):
    await reader.start()
    waiting = asyncio.create_task(reader.read(COSTLY))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await reader.read(FILES) == read_manifest(FILES)


async def test_many_readings_at_once_get_each_their_own():
    reader = Reader()
    try:
        texts = [SEED.replace("web", f"web-{n}").encode() for n in range(8)]
        readings = await asyncio.gather(*(reader.read({"a.mill": text}) for text in texts))
        assert [one.manifest.services[1].name for one in readings] == [
            f"web-{n}" for n in range(8)]
    finally:
        await reader.close()


async def test_a_closed_reader_has_no_child_and_reads_no_more():
    reader = Reader()
    await reader.start()
    pid = reader.child_pid
    assert pid is not None
    await reader.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(Unavailable):
        await reader.read(FILES)


async def test_the_child_ends_when_its_parent_closes_the_pipe(reader):
    await reader.start()
    child = reader._child
    assert child is not None
    child.stdin.close()
    assert await asyncio.wait_for(child.wait(), 60) == 0
