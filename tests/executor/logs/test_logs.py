"""The log process: lossless over the agent's death, back after its own."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from reconciler.executor.agent.logs import LogLine, LogsFailed, LogStore

DEADLINE_S = 60.0
ALLOC = "web-aaaaaa"

# Writes COUNT numbered lines to the fifo, in uneven chunks; a broken pipe is its end, exit 1.
WRITER = """
import os, sys
path, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
data = b"".join(b"line %d\\n" % number for number in range(first, first + count))
fifo = os.open(path, os.O_WRONLY)
while data:
    data = data[os.write(fifo, data[:4099]):]
"""

# An agent that attaches, says so, and holds on until it is killed.
AGENT = """
import asyncio, sys
from pathlib import Path
from reconciler.executor.agent.logs import LogStore
async def main():
    logs = LogStore(Path(sys.argv[1]))
    await logs.ensure_running()
    print(*await logs.attach(sys.argv[2]), flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.fixture
async def logs(tmp_path: Path) -> AsyncIterator[LogStore]:
    store = LogStore(folder(tmp_path))
    yield store
    await store.stop()
    assert processes(folder(tmp_path)) == []


def folder(tmp_path: Path) -> Path:
    """Longer than the 107 bytes that a unix socket's path may have."""
    return tmp_path / ("deep" * 30) / "node-1" / "logs"


def processes(served: Path) -> list[int]:
    """The log processes of a folder: each has it as its working directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if b"reconciler.executor.agent.logwriter" in words:
                found += [int(entry.name)] if os.readlink(entry / "cwd") == str(served) else []
        except OSError:
            continue
    return found


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode()


def write(path: str, data: bytes) -> None:
    with open(path, "wb", buffering=0) as fifo:
        fifo.write(data)


async def writer(path: str, first: int, count: int) -> asyncio.subprocess.Process:
    arguments = (path, str(first), str(count))
    return await asyncio.create_subprocess_exec(sys.executable, "-c", WRITER, *arguments)


async def until(fact: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not fact():  # a fact about another process sets no event
            await asyncio.sleep(0.005)


async def until_logged(logs: LogStore, alloc: str, last: str) -> list[LogLine]:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            lines = await logs.tail(alloc, 100_000)
            if lines and lines[-1].line == last:
                return lines
            await asyncio.sleep(0.005)


async def test_streams_are_told_apart(logs: LogStore) -> None:
    stdout, stderr = await logs.attach(ALLOC)
    write(stdout, b"hello\n")
    await until_logged(logs, ALLOC, "hello")
    write(stderr, b"oh no\n")
    lines = await until_logged(logs, ALLOC, "oh no")
    assert [(line.stream, line.line) for line in lines] == [
        ("stdout", "hello"),
        ("stderr", "oh no"),
    ]


async def test_starting_twice_at_once_gives_one_process(logs: LogStore, tmp_path: Path) -> None:
    others = [LogStore(folder(tmp_path)) for _ in range(4)]
    await asyncio.gather(*(store.ensure_running() for store in (logs, *others)))
    await logs.ensure_running()
    (pid,) = processes(folder(tmp_path))
    assert "node-1" not in command_line(pid)


async def test_no_line_is_lost_while_agents_are_killed(logs: LogStore, tmp_path: Path) -> None:
    count = 200_000
    writing = None
    for _ in range(4):
        agent = await asyncio.create_subprocess_exec(
            sys.executable, "-c", AGENT, str(folder(tmp_path)), ALLOC, stdout=subprocess.PIPE
        )
        assert agent.stdout is not None
        stdout = (await agent.stdout.readline()).decode().split()[0]
        writing = writing or await writer(stdout, 0, count)
        agent.kill()
        await agent.wait()
    assert writing is not None
    assert await writing.wait() == 0
    await logs.detach(ALLOC)
    seen = [line.line async for line in logs.follow(ALLOC)]
    assert seen == [f"line {number}" for number in range(count)]


async def test_a_killed_log_process_comes_back_and_goes_on(logs: LogStore, tmp_path: Path) -> None:
    stdout, stderr = await logs.attach(ALLOC)
    await logs.attach("api-bbbbbb")
    await (await writer(stdout, 0, 1000)).wait()
    await until_logged(logs, ALLOC, "line 999")
    (pid,) = processes(folder(tmp_path))
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not processes(folder(tmp_path)))
    # More than a pipe holds, written while nobody reads: it waits, it does not break.
    writing = await writer(stdout, 1000, 300_000)
    await logs.ensure_running()
    assert await writing.wait() == 0
    write(stderr, b"and on\n")
    await logs.detach(ALLOC)
    lines = [line async for line in logs.follow(ALLOC)]
    out = [line.line for line in lines if line.stream == "stdout"]
    assert out == [f"line {number}" for number in range(301_000)]
    assert "and on" in [line.line for line in lines if line.stream == "stderr"]
    stamps = [line.ts for line in lines]
    assert stamps == sorted(set(stamps))


async def test_last_words_said_while_the_log_process_is_dead_are_kept(
    logs: LogStore, tmp_path: Path
) -> None:
    stdout, _ = await logs.attach(ALLOC)
    (pid,) = processes(folder(tmp_path))
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not processes(folder(tmp_path)))
    assert await (await writer(stdout, 0, 10)).wait() == 0  # it is gone, its words in the pipe
    await logs.detach(ALLOC)
    assert [line.line for line in await logs.tail(ALLOC, 100)] == [f"line {n}" for n in range(10)]


async def test_detach_reads_to_the_end_and_finishes_a_torn_line(logs: LogStore) -> None:
    for _ in range(2):  # and the allocation may come back
        stdout, stderr = await logs.attach(ALLOC)
        write(stdout, b"x" * 50_000 + b"\nwhole\ntorn")
        write(stderr, b"also torn")
        await logs.detach(ALLOC)
        await logs.detach(ALLOC)
    lines = await logs.tail(ALLOC, 100)
    out = [line.line for line in lines if line.stream == "stdout"]
    assert out[-2:] == ["whole", "torn"]
    assert "".join(out[:-2]) == "x" * 50_000 + "wholetorn" + "x" * 50_000
    assert [line.line for line in lines if line.stream == "stderr"] == ["also torn"] * 2


async def test_stopping_finishes_torn_lines_and_leaves_the_logs(
    logs: LogStore, tmp_path: Path
) -> None:
    stdout, _ = await logs.attach(ALLOC)
    write(stdout, b"whole\ntorn")
    await until_logged(logs, ALLOC, "whole")
    await logs.stop()
    assert processes(folder(tmp_path)) == []
    assert [line.line for line in await logs.tail(ALLOC, 9)] == ["whole", "torn"]
    await logs.stop()


async def test_attach_works_again_after_stop(logs: LogStore) -> None:
    await logs.attach(ALLOC)
    await logs.stop()
    stdout, _ = await logs.attach(ALLOC)
    write(stdout, b"hello\n")
    assert len(await until_logged(logs, ALLOC, "hello")) == 1


async def test_follow_ends_with_the_allocation_across_rotation(logs: LogStore) -> None:
    count, wide = 250_000, 60  # 24 MB in the files: two rotations
    stdout, _ = await logs.attach(ALLOC)

    async def follow() -> list[str]:
        return [line.line async for line in logs.follow(ALLOC)]

    following = asyncio.create_task(follow())
    code = WRITER.replace("line %d", "line %d " + "." * wide)
    writing = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout, "0", str(count)
    )
    assert await writing.wait() == 0
    assert not following.done()
    await logs.detach(ALLOC)
    seen = await asyncio.wait_for(following, DEADLINE_S)
    assert seen == [f"line {number} " + "." * wide for number in range(count)]


async def test_follow_begins_after_a_line(logs: LogStore) -> None:
    stdout, _ = await logs.attach(ALLOC)
    write(stdout, b"one\ntwo\nthree\n")
    lines = await until_logged(logs, ALLOC, "three")
    await logs.detach(ALLOC)
    assert [line.line async for line in logs.follow(ALLOC, lines[0].ts)] == ["two", "three"]


async def test_a_removed_log_is_gone(logs: LogStore, tmp_path: Path) -> None:
    stdout, _ = await logs.attach(ALLOC)
    write(stdout, b"hello\n")
    await until_logged(logs, ALLOC, "hello")
    await logs.remove(ALLOC)
    await logs.remove(ALLOC)
    assert await logs.tail(ALLOC, 5) == []
    assert [line async for line in logs.follow(ALLOC)] == []
    assert ALLOC not in os.listdir(folder(tmp_path))


async def test_one_loud_allocation_does_not_hold_up_another(logs: LogStore) -> None:
    loud, _ = await logs.attach("loud-aaaaaa")
    quiet, _ = await logs.attach("quiet-bbbbbb")
    endless = "import os,sys\nfd=os.open(sys.argv[1],1)\nwhile 1: os.write(fd, b'x' * 99 + b'\\n')"
    writing = await asyncio.create_subprocess_exec(sys.executable, "-c", endless, loud)
    try:
        await until_logged(logs, "loud-aaaaaa", "x" * 99)
        write(quiet, b"hello\n")
        assert await until_logged(logs, "quiet-bbbbbb", "hello")
        assert writing.returncode is None
        await logs.detach("loud-aaaaaa")  # ends although the writer does not
    finally:
        writing.kill()
        await writing.wait()


async def test_files_are_for_root_alone(logs: LogStore, tmp_path: Path) -> None:
    stdout, _ = await logs.attach(ALLOC)
    write(stdout, b"hello\n")
    await until_logged(logs, ALLOC, "hello")
    assert open_to_others(folder(tmp_path)) == []


def open_to_others(top: Path) -> list[Path]:
    """What others than its owner may use below `top`; its folder guards the socket."""
    return [
        path
        for path in (top, *top.rglob("*"))
        if path.stat().st_mode & 0o077 and not path.is_socket()
    ]


@pytest.mark.parametrize("alloc", ["", ".lock", "../x", "a/b"])
async def test_a_name_that_leaves_the_folder_is_refused(logs: LogStore, alloc: str) -> None:
    with pytest.raises(ValueError, match="allocation"):
        await logs.attach(alloc)


async def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LogsFailed, match="Not a directory") as caught:
        await LogStore(tmp_path / "file" / "logs").ensure_running()
    assert caught.value.at == str(tmp_path / "file" / "logs")


async def test_requests_answer_while_sixty_allocations_are_attached(logs: LogStore) -> None:
    await asyncio.gather(*(logs.attach(f"web-{number:06}") for number in range(60)))
    for number in range(60):
        write(str((await logs.attach(f"web-{number:06}"))[0]), b"hello\n")
    for number in range(60):
        assert len(await until_logged(logs, f"web-{number:06}", "hello")) == 1
