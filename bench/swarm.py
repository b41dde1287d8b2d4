"""Docker Swarm doing the same work: an engine of its own, in namespaces of its own.

The engine runs in its own network, mount and process namespaces, with its own data, exec-root and
socket, so that the host's network stays as it is and the end of one process ends all of it.
Services are created and updated through the Engine API, all at once, as a stack would.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from bench.floor import READY_AFTER_MS, Workload
from tests.images.compile import compile_server

START_S, WORK_S = 60.0, 120.0
LOOK_EVERY_S = 0.01
SETTLE_S = 1.0
"""How long Swarm watches an update, as mill's settle does."""
INSTALL = ("apt-get", "install", "-y", "--no-install-recommends", "docker.io")
INSIDE = """\
ip link set lo up && mount -t tmpfs run /run || exit 1
dockerd --data-root "$1/data" --exec-root "$1/exec" --pidfile "$1/pid" \
        --host "unix://$1/s" --cgroup-parent "$2" --live-restore=false &
wait
"""


class SwarmAbsent(Exception):
    """The engine cannot work here; says what it said."""


def install() -> None:
    """docker.io from the distribution, where it is missing."""
    if shutil.which("dockerd") is None:
        print("installing docker.io ...", flush=True)
        done = subprocess.run(INSTALL, capture_output=True, text=True, check=False,
                              env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
        if done.returncode:
            raise SwarmAbsent(f"apt-get install docker.io: {done.stderr.strip()[-300:]}")


def _start(folder: Path, group: str) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True)
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
             "sh", "-c", INSIDE, "sh", str(folder), group],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log)


@contextlib.asynccontextmanager
async def swarm(folder: Path) -> AsyncIterator[Swarm]:
    """A swarm of one node, with its image; nothing of it is left at the end."""
    install()
    group = f"/mill-bench-{os.getpid()}"
    engine = _start(folder, group)
    try:
        transport = httpx.AsyncHTTPTransport(uds=str(folder / "s"))
        async with httpx.AsyncClient(base_url="http://engine/v1.41", transport=transport,
                                     timeout=WORK_S) as client:
            it = Swarm(client)
            try:
                await it.begin(engine)
            except (SwarmAbsent, httpx.HTTPError, TimeoutError) as error:
                said = (folder / "log").read_text(errors="replace").splitlines()[-3:]
                raise SwarmAbsent(f"{error}; its log ends: {' | '.join(said)}") from error
            yield it
    finally:
        engine.kill()  # with it ends all that is inside
        engine.wait()
        await asyncio.to_thread(_remove_groups, group)


class Swarm:
    """Creates, updates and removes services, and says when each was done."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._image = ""
        self._round = 0

    async def begin(self, engine: subprocess.Popen[bytes]) -> None:
        async with asyncio.timeout(START_S):
            while not await self._serves():
                if engine.poll() is not None:
                    raise SwarmAbsent(f"dockerd ended with code {engine.returncode}")
                await asyncio.sleep(0.1)
        await self._ask("POST", "/swarm/init", {
            "ListenAddr": "127.0.0.1:2377", "AdvertiseAddr": "127.0.0.1"})
        self._image = await self._import()

    async def create_s(self, workloads: Sequence[Workload], interval_s: float) -> float:
        """Seconds until all replicas of new services are healthy."""
        self._round += 1
        began = time.perf_counter()
        await asyncio.gather(*(
            self._ask("POST", "/services/create", self._spec(one, interval_s))
            for one in workloads))
        await self._until(lambda: self._running(workloads))
        return time.perf_counter() - began

    async def update_s(
        self, workloads: Sequence[Workload], interval_s: float
    ) -> tuple[float, float]:
        """Seconds until all new replicas (surged beside the old) are healthy, and until Swarm
        calls the update of every service completed."""
        self._round += 1
        began = time.perf_counter()
        await asyncio.gather(*(self._update(one, interval_s) for one in workloads))
        await self._until(lambda: self._running(workloads))
        healthy = time.perf_counter() - began
        await self._until(lambda: self._completed(workloads))
        return healthy, time.perf_counter() - began

    async def remove(self, workloads: Sequence[Workload]) -> None:
        """Until no container is left."""
        for one in workloads:
            await self._ask("DELETE", f"/services/{one.name}")
        await self._until(self._empty)

    # -- what it is asked ------------------------------------------------------------------

    def _spec(self, one: Workload, interval_s: float) -> dict[str, Any]:
        env = {"PORT": str(one.port), "READY_AFTER_MS": str(READY_AFTER_MS),
               "ROUND": str(self._round), **dict(one.env)}
        second = 1_000_000_000
        return {
            "Name": one.name,
            "Mode": {"Replicated": {"Replicas": one.replicas}},
            "TaskTemplate": {
                "ContainerSpec": {
                    "Image": self._image,
                    "Env": [f"{name}={value}" for name, value in env.items()],
                    "Healthcheck": {
                        "Test": ["CMD", "/server", "get", str(one.port), one.path],
                        "Interval": int(interval_s * second), "Timeout": 2 * second, "Retries": 3,
                    },
                },
                "Resources": {"Limits": {"NanoCPUs": int(one.cpu * second),
                                         "MemoryBytes": one.memory_mib << 20}},
            },
            "UpdateConfig": {"Parallelism": 0, "Order": "start-first",
                             "Monitor": int(SETTLE_S * second), "FailureAction": "rollback"},
        }

    async def _update(self, one: Workload, interval_s: float) -> None:
        known = await self._ask("GET", f"/services/{one.name}")
        await self._ask("POST", f"/services/{known['ID']}/update?version="
                                f"{known['Version']['Index']}", self._spec(one, interval_s))

    async def _running(self, workloads: Sequence[Workload]) -> bool:
        """A task with a health check is `running` only once that has passed."""
        mark = f"ROUND={self._round}"
        tasks = await self._ask("GET", "/tasks")
        up = [t for t in tasks if t["Status"]["State"] == "running"
              and mark in t["Spec"]["ContainerSpec"]["Env"]]
        return len(up) == sum(one.replicas for one in workloads)

    async def _completed(self, workloads: Sequence[Workload]) -> bool:
        services = await self._ask("GET", "/services")
        states = [s.get("UpdateStatus", {}).get("State") for s in services]
        return states.count("completed") == len(workloads)

    async def _empty(self) -> bool:
        return not await self._ask("GET", "/containers/json?all=true")

    async def _until(self, holds: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(WORK_S):
            while not await holds():
                await asyncio.sleep(LOOK_EVERY_S)

    async def _serves(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return (await self._client.get("/_ping")).is_success
        return False

    async def _import(self) -> str:
        """The test server as an image, named by its id: so nothing asks a registry for it."""
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w") as tar:
            entry = tarfile.TarInfo("server")
            program = compile_server()
            entry.size, entry.mode = len(program), 0o755
            tar.addfile(entry, io.BytesIO(program))
        done = await self._client.post(
            "/images/create", params={"fromSrc": "-", "changes": 'ENTRYPOINT ["/server"]'},
            content=raw.getvalue(), headers={"Content-Type": "application/x-tar"})
        at = done.raise_for_status().text.index("sha256:")
        return done.text[at : at + 71]

    async def _ask(self, method: str, path: str, body: object = None) -> Any:
        done = await self._client.request(method, path, json=body)
        if done.is_error:
            raise SwarmAbsent(f"{method} {path}: {done.status_code} {done.text.strip()}")
        return done.json() if done.content else None


def _remove_groups(group: str) -> None:
    """The engine's cgroups outlive it, empty."""
    for root in Path("/sys/fs/cgroup").glob(f"**{group}"):
        folders = sorted((p for p in root.rglob("*") if p.is_dir()), reverse=True)
        for folder in (*folders, root):
            for _ in range(50):
                try:
                    folder.rmdir()
                    break
                except OSError:  # its last process is on its way out
                    time.sleep(0.1)
