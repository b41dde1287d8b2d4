"""One private containerd and one registry for the session, a namespace of its own for each test."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from reconciler.executor.containerd import containers, daemon, pull
from reconciler.executor.containerd.cgroups import remove_cgroup
from reconciler.executor.containerd.client import Containerd
from reconciler.executor.containerd.pull import PulledImage
from reconciler.executor.containerd.spec import ContainerSpec
from tests.images.build import Image, push, server_image
from tests.images.registry import local_registry

CGROUP = f"/mill-containerd-test-{os.getpid()}"


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[daemon.DaemonPaths]:
    if os.geteuid() != 0:
        pytest.skip("containerd needs root")
    folder = tmp_path_factory.mktemp("containerd")
    try:
        daemon.start_daemon(folder)
        yield daemon.daemon_paths(folder)
    finally:
        daemon.purge_daemon(folder)
        remove_cgroup(CGROUP)


@pytest.fixture(scope="session")
def image() -> Image:
    return server_image("v1")


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory, image: Image) -> Iterator[str]:
    """The host of a registry that holds `web:v1`."""
    with local_registry(tmp_path_factory.mktemp("registry")) as url:
        push(url, "web", "v1", image)
        yield url.removeprefix("http://")


@pytest.fixture
async def client(paths: daemon.DaemonPaths) -> AsyncIterator[Containerd]:
    """A client in a fresh namespace; what the test leaves in it is removed."""
    namespace = f"test-{secrets.token_hex(4)}"
    async with Containerd(paths.socket, namespace, runc_root=paths.runc_root) as client:
        await client.ensure_namespace()
        yield client
        await containers.sweep(client)
        for state in await containers.list_all(client):
            await containers.remove(client, state.id)
        for record in await pull.list_images(client):
            for pin in record.pins:
                await pull.unpin_image(client, record.image, record.digest, pin)
            await pull.remove_image(client, record.image, record.digest)


@pytest.fixture
def netns() -> Iterator[str]:
    """The path of a network namespace of the test's own."""
    name = f"mill-containerd-test-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield f"/run/netns/{name}"
    subprocess.run(["ip", "netns", "delete", name], check=True)


def unseen(_done: int, _total: int | None) -> None:
    """Progress that nobody looks at."""


@pytest.fixture
async def pulled(client: Containerd, registry: str) -> PulledImage:
    return await pull.pull(client, f"{registry}/web:v1", None, None, unseen)


@dataclass(frozen=True)
class Desk:
    """Makes specs of containers of one test; the fifos are in its folder."""

    folder: Path
    image: PulledImage

    def spec(self, name: str = "one", **changes: object) -> ContainerSpec:
        settings: dict[str, object] = {
            "id": name,
            "image": self.image,
            "cgroup": f"{CGROUP}/{name}",
            "stdout": str(self.folder / f"{name}.out"),
            "stderr": str(self.folder / f"{name}.err"),
            "env": ("PORT=3000", "MILL_SERVICE=web", f"MILL_ALLOC={name}"),
            "memory_bytes": 64 << 20,
        }
        return ContainerSpec(**(settings | changes))  # type: ignore[arg-type]  # names of its fields


@pytest.fixture
def desk(tmp_path: Path, pulled: PulledImage) -> Desk:
    return Desk(tmp_path, pulled)


async def until(fact: Callable[[], bool], what: str, deadline_s: float = 60.0) -> None:
    """Wait until `fact` holds; fails with `what` when it does not by the deadline."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + deadline_s
    while not fact():
        assert loop.time() < deadline, f"{what}: not within {deadline_s} s"
        await asyncio.sleep(0.02)


def text(path: str) -> str:
    """What a small file says now."""
    return Path(path).read_text()


def there(path: str) -> bool:
    """Whether anything is at that path now."""
    return Path(path).exists()


def lives(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    return Path(f"/proc/{pid}/exe").is_symlink() and "State:\tZ" not in text(f"/proc/{pid}/status")
