"""Steady traffic through the ingress of two nodes, every answer checked.

Half of the workers keep their connection, half open one for each request; half send GET, half
POST. A reset, a time-out, any status but 200, or an answer of an old version to a request sent
after `barrier`, is a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

TIMEOUT_S = 10.0
RATE = 240
"""Requests a second that are begun; over the 200 that must be kept up."""
WORKERS = 32


@dataclass
class Load:
    """What was sent, and what went wrong."""

    ports: tuple[int, ...]
    host: str
    path: str = "/work"
    sent: int = 0
    versions: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    started_at: float = field(default_factory=time.monotonic)
    newest: str = ""

    def barrier(self, version: str) -> None:
        """From now on every request that is sent must be answered by `version`."""
        self.newest = version

    @property
    def rate(self) -> float:
        """Requests a second so far."""
        return self.sent / (time.monotonic() - self.started_at)

    async def worker(self, number: int, tickets: asyncio.Queue[int]) -> None:
        keep, post = number % 2 == 0, number // 2 % 2 == 0
        port = self.ports[number // 4 % len(self.ports)]
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while True:
            await tickets.get()
            expected = self.newest
            self.sent += 1
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    if connection is None:
                        connection = await asyncio.open_connection("127.0.0.1", port)
                    body, closes = await _ask(connection, self.host, self.path, post=post,
                                              keep=keep)
                self._check(body, expected)
                if keep and not closes:
                    continue
            except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError) as error:
                self.failures.append(f"worker {number}: {error!r}")
            if connection is not None:
                connection[1].close()
                connection = None

    def _check(self, body: str, expected: str) -> None:
        words = dict(word.split("=", 1) for word in body.split() if "=" in word)
        version = words.get("version", "?")
        self.versions[version] += 1
        if expected and version != expected:
            self.failures.append(f"answered by {version} after {expected} was routed")


async def _ask(
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], host: str, path: str,
    *, post: bool, keep: bool,
) -> tuple[str, bool]:
    reader, writer = connection
    body = b"x" * 100 if post else b""
    head = f"{'POST' if post else 'GET'} {path} HTTP/1.1\r\nHost: {host}\r\n"
    head += f"Content-Length: {len(body)}\r\n" if post else ""
    head += "" if keep else "Connection: close\r\n"
    writer.write(head.encode() + b"\r\n" + body)
    answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    status = int(answer[9:12])
    length = next(int(line.split(":")[1]) for line in answer.split("\r\n")
                  if line.startswith("content-length:"))
    text = (await reader.readexactly(length)).decode()
    if status != 200:
        raise ValueError(f"status {status}: {text[:80]}")
    return text, "connection: close" in answer


@contextlib.asynccontextmanager
async def load(*ports: int, host: str, path: str = "/work") -> AsyncIterator[Load]:
    """Traffic for as long as the context lasts."""
    it = Load(ports, host, path)
    tickets: asyncio.Queue[int] = asyncio.Queue()
    tasks = [asyncio.create_task(it.worker(n, tickets)) for n in range(WORKERS)]

    async def pace() -> None:
        start = time.monotonic()
        for number in itertools.count():
            await asyncio.sleep(max(0.0, start + number / RATE - time.monotonic()))
            tickets.put_nowait(number)

    tasks.append(asyncio.create_task(pace()))
    try:
        yield it
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
