"""One look at an allocation: does it serve?

Probes leave from a socket made in the node's own network namespace, which routes to the
allocations of all nodes. HTTP is spoken with h11; any 2xx passes.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import assert_never

import h11

from reconciler.executor.agent.orders import Probe

FIRST_MS = (50, 100, 200, 400)
"""Moments of the first probes after a start (contracts: Defaults)."""
EAGER_MS = 500
"""The longest wait between probes while a deploy watches."""
READ_BYTES = 64 * 1024

MakeSocket = Callable[[], Awaitable[socket.socket]]
RunCommand = Callable[[tuple[str, ...], float], Awaitable[int]]


@dataclass(frozen=True)
class Verdict:
    """One probe's outcome, and in a few words why."""

    passed: bool
    detail: str


@dataclass(frozen=True)
class Target:
    """Where an allocation answers; `run` executes a command inside it, giving its exit code."""

    address: str
    port: int | None
    make_socket: MakeSocket
    run: RunCommand


def waits_ms(probe: Probe, since_start_ms: int, eager: bool) -> int:
    """Milliseconds from now to the next probe, `since_start_ms` after the start."""
    for moment in FIRST_MS:
        if since_start_ms < moment:
            return moment - since_start_ms
    return min(probe.interval_ms, EAGER_MS) if eager else probe.interval_ms


async def look(probe: Probe, target: Target) -> Verdict:
    """Probe once, within the probe's own timeout."""
    timeout_s = probe.timeout_ms / 1000
    try:
        async with asyncio.timeout(timeout_s):
            match probe.kind:
                case "running":
                    return Verdict(True, "it runs")
                case "tcp":
                    return await _tcp(target)
                case "http":
                    return await _http(target, probe.path)
                case "command":
                    code = await target.run(probe.command, timeout_s)
                    return Verdict(code == 0, f"{probe.command[0]} exited with code {code}")
                case _:
                    assert_never(probe.kind)
    except TimeoutError:
        return Verdict(False, f"no answer within {timeout_s:g} s")
    except OSError as error:
        why = os.strerror(error.errno).lower() if error.errno else str(error)
        return Verdict(False, f"port {target.port}: {why}")
    except h11.RemoteProtocolError as error:
        return Verdict(False, f"port {target.port} does not speak HTTP: {error}")


async def _connect(target: Target) -> socket.socket:
    sock = await target.make_socket()
    try:
        await asyncio.get_running_loop().sock_connect(sock, (target.address, target.port))
    except BaseException:
        sock.close()
        raise
    return sock


async def _tcp(target: Target) -> Verdict:
    (await _connect(target)).close()
    return Verdict(True, f"port {target.port} accepts")


async def _http(target: Target, path: str) -> Verdict:
    with await _connect(target) as sock:
        loop = asyncio.get_running_loop()
        conversation = h11.Connection(h11.CLIENT)
        request = h11.Request(method="GET", target=path, headers=[
            ("Host", f"{target.address}:{target.port}"), ("User-Agent", "mill-health"),
            ("Connection", "close"),
        ])
        await loop.sock_sendall(sock, conversation.send(request) or b"")
        await loop.sock_sendall(sock, conversation.send(h11.EndOfMessage()) or b"")
        while True:
            event = conversation.next_event()
            if event is h11.NEED_DATA:
                conversation.receive_data(await loop.sock_recv(sock, READ_BYTES))
            elif isinstance(event, h11.Response):
                status = event.status_code
                return Verdict(200 <= status < 300, f"GET {path} answered {status}")
            elif not isinstance(event, h11.InformationalResponse):
                return Verdict(False, f"GET {path} was not answered")


@dataclass
class Judge:
    """Verdicts in a row make a state: None until the first pass, or until the deadline."""

    probe: Probe
    healthy: bool | None = None
    passes: int = 0
    failures: int = 0

    def take(self, verdict: Verdict, since_start_ms: int) -> bool:
        """Count a verdict; True where the state changed."""
        before = self.healthy
        if verdict.passed:
            self.passes, self.failures = self.passes + 1, 0
            if self.passes >= self.probe.healthy:
                self.healthy = True
        else:
            self.passes, self.failures = 0, self.failures + 1
            overdue = since_start_ms >= self.probe.deadline_ms
            judged = self.healthy is not None
            if self.failures >= self.probe.unhealthy and (judged or overdue):
                self.healthy = False
        return self.healthy is not before


