"""A real cluster with a real registry, once for all end-to-end tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from reconciler.api.client import Client, DeployOptions
from reconciler.dev import Dev, Founding, Options
from tests.images.build import publish_demo_images
from tests.images.registry import local_registry
from tests.ports import free_base


def needs_containers() -> str:
    """Why this machine cannot run containers; "" where it can."""
    if os.geteuid() != 0:
        return "needs root"
    lacking = [p for p in ("containerd", "runc", "docker-registry") if shutil.which(p) is None]
    return f"needs {', '.join(lacking)}" if lacking else ""


@dataclass
class Cluster:
    """A running `mill dev`, and its registry."""

    dev: Dev
    founding: Founding
    registry: str
    said: list[str]

    def client(self, node: str = "node-1") -> Client:
        return Client([self.dev.address(node)], self.founding.token)

    def http(self, node: str = "node-1") -> int:
        return self.dev.options.base_port + 10 * (int(node[-1]) - 1) + 4

    def dns(self, node: str = "node-1") -> int:
        return self.dev.options.base_port + 10 * (int(node[-1]) - 1) + 3

    async def deploy(self, text: str, **options: object) -> list[tuple[str, object]]:
        """Deploy; (phase or event, step) of the whole stream. `REG` is the registry."""
        seen = []
        async with self.client() as client:
            stream = client.deploy({"app.mill": text.replace("REG", self.registry)},
                                   DeployOptions(**options))  # type: ignore[arg-type]  # as named
            async for event in stream:
                seen.append((event.step.phase or event.event, event.step))
        return seen


@contextlib.asynccontextmanager
async def running(folder: Path, registry: str, nodes: int = 3) -> AsyncIterator[Cluster]:
    said: list[str] = []
    dev = Dev(Options(nodes=nodes, data=folder, base_port=free_base(nodes)), said.append)
    try:
        async with dev.up() as founding:
            yield Cluster(dev, founding, registry, said)
    finally:
        await dev.reset()


@pytest.fixture(scope="session")
def registry() -> Iterator[str]:
    if needs_containers():
        pytest.skip(needs_containers())
    with tempfile.TemporaryDirectory() as folder, local_registry(Path(folder)) as url:
        publish_demo_images(url)
        yield url.removeprefix("http://")


@pytest.fixture
async def cluster(tmp_path: Path, registry: str) -> AsyncIterator[Cluster]:
    """Three nodes of its own for a test."""
    async with running(tmp_path / "dev", registry) as it:
        yield it


async def eventually(holds: object, within_s: float = 60.0) -> None:
    """Wait for a fact of another process: `holds` is called until it is true."""
    async with asyncio.timeout(within_s):
        while True:
            result = holds()  # type: ignore[operator]  # a function, or one that gives a coroutine
            if asyncio.iscoroutine(result):
                result = await result
            if result:
                return
            await asyncio.sleep(0.05)
