"""Probes against real sockets, and how verdicts become a state."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from reconciler.executor.agent.orders import Probe
from reconciler.executor.agent.probe import Judge, Target, Verdict, look, waits_ms


@asynccontextmanager
async def server(answer: bytes) -> AsyncIterator[Target]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with listening:
        yield target(listening.sockets[0].getsockname()[1])


def target(port: int, code: int = 0) -> Target:
    async def make() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        made.setblocking(False)
        return made

    async def run(argv: tuple[str, ...], timeout_s: float) -> int:
        return code

    return Target("127.0.0.1", port, make, run)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


@pytest.mark.parametrize(("status", "passed"), [
    (b"200 OK", True), (b"204 No Content", True), (b"301 Moved", False),
    (b"500 Internal Server Error", False),
])
async def test_any_2xx_passes_and_nothing_else(status: bytes, passed: bool) -> None:
    async with server(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\n\r\n") as it:
        verdict = await look(Probe(kind="http", path="/health"), it)
    assert verdict.passed is passed
    assert status[:3].decode() in verdict.detail


async def test_what_is_no_http_fails_and_says_so() -> None:
    async with server(b"hello\r\n\r\n") as it:
        verdict = await look(Probe(kind="http", path="/"), it)
    assert "does not speak HTTP" in verdict.detail


async def test_a_closed_port_fails_with_the_reason() -> None:
    verdict = await look(Probe(kind="tcp"), target(free_port()))
    assert not verdict.passed
    assert "refused" in verdict.detail


async def test_a_silent_server_fails_at_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        probe = Probe(kind="http", path="/", timeout_ms=50)
        verdict = await look(probe, target(silent.getsockname()[1]))
    assert "no answer within 0.05 s" in verdict.detail


async def test_a_command_passes_by_its_exit_code() -> None:
    probe = Probe(kind="command", command=("check",))
    assert (await look(probe, target(1, code=0))).passed
    assert not (await look(probe, target(1, code=3))).passed


def test_the_first_probes_come_at_50_100_200_and_400_ms() -> None:
    probe = Probe(kind="tcp", interval_ms=10_000)
    assert [at + waits_ms(probe, at, eager=True) for at in (0, 50, 100, 200)] \
        == [50, 100, 200, 400]
    assert waits_ms(probe, 400, eager=True) == 500
    assert waits_ms(probe, 5_000, eager=False) == 10_000
    assert waits_ms(Probe(kind="tcp", interval_ms=200), 400, eager=True) == 200


def test_failures_before_the_first_pass_are_no_verdict_until_the_deadline() -> None:
    judge = Judge(Probe(kind="tcp", unhealthy=3, deadline_ms=1_000))
    for _ in range(10):
        judge.take(Verdict(False, ""), 500)
    assert judge.healthy is None
    assert judge.take(Verdict(False, ""), 1_000)
    assert judge.healthy is False


def test_passes_and_failures_count_in_a_row() -> None:
    judge = Judge(Probe(kind="tcp", healthy=2, unhealthy=3))
    states = []
    for passed in (True, False, True, True, False, False, True, False, False, False):
        judge.take(Verdict(passed, ""), 0)
        states.append(judge.healthy)
    assert states == [None, None, None, True, True, True, True, True, True, False]
