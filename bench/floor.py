"""The work that every contender does, and the least it can cost: `ctr run` by hand.

The floor starts the containers at once through the same private containerd that mill uses, on the
host's network, and waits until each answers. No plan, no log, no network of their own, no routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.images.registry import free_port

READY_AFTER_MS = 100
"""How long each container takes from its start until it answers."""
ANSWER_S = 60.0
LOOK_EVERY_S = 0.002
NAMESPACE = "floor"


@dataclass(frozen=True)
class Workload:
    """A service: cores, bytes, and where it answers."""

    name: str
    image: str
    port: int
    replicas: int
    cpu: float
    memory_mib: int
    path: str
    route: str = ""
    env: tuple[tuple[str, str], ...] = ()


SEED = (
    Workload("web", "web:v1", 3000, 2, 0.5, 512, "/health", route="app.example.com"),
    Workload("api", "api:v1", 8080, 1, 1.0, 1024, "/healthz",
             env=(("DATABASE_URL", "${secret(db.url)}"),)),
)
"""The two services, three containers, of the first deploy's document; health every second."""


def many(count: int) -> tuple[Workload, ...]:
    """As many small services of one replica each."""
    return tuple(
        Workload(f"s{n:03}", "web:v1", 3000, 1, 0.02, 16, "/health") for n in range(count))


class Ctr:
    """containerd's own command line, on the daemon behind `socket`."""

    def __init__(self, socket: Path, runc_root: Path) -> None:
        self._head = ["ctr", "--address", str(socket), "--namespace", NAMESPACE]
        self._runc_root = runc_root

    async def pull(self, reference: str) -> None:
        await self._do("images", "pull", "--plain-http", reference)

    async def first_answer_s(self, registry: str, workloads: Sequence[Workload]) -> float:
        """Seconds from the first `ctr run` until all replicas answer; then they are gone again."""
        ports = {
            f"{one.name}-{n}": (one, free_port()) for one in workloads for n in range(one.replicas)
        }
        began = time.perf_counter()
        try:
            async with asyncio.timeout(ANSWER_S):
                await asyncio.gather(*(
                    self._up(registry, name, one, port) for name, (one, port) in ports.items()))
                return time.perf_counter() - began
        finally:
            await asyncio.gather(*(self.remove(name) for name in ports))

    async def _up(self, registry: str, name: str, one: Workload, port: int) -> None:
        await self._do(
            "run", "--detach", "--null-io", "--net-host", "--runc-root", str(self._runc_root),
            "--env", f"PORT={port}", "--env", f"READY_AFTER_MS={READY_AFTER_MS}",
            f"{registry}/{one.image}", name)
        while not await _answers(port, one.path):
            await asyncio.sleep(LOOK_EVERY_S)

    async def remove(self, name: str) -> None:
        with contextlib.suppress(RuntimeError):
            await self._do("task", "rm", "--force", name)
        with contextlib.suppress(RuntimeError):
            await self._do("container", "rm", name)

    async def _do(self, *words: str) -> None:
        child = await asyncio.create_subprocess_exec(
            *self._head, *words, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
        said, _ = await child.communicate()
        if child.returncode:
            raise RuntimeError(f"ctr {' '.join(words)}: {said.decode().strip()}")


async def _answers(port: int, path: str) -> bool:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return (await reader.readline()).startswith(b"HTTP/1.1 200")
    finally:
        writer.close()
