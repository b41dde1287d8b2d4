"""Fifty deploys leave no more behind than five: nothing grows with the number of deploys."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from reconciler.executor.containerd import containers
from reconciler.executor.containerd.client import Containerd
from reconciler.executor.containerd.snapshot import list_snapshots
from reconciler.node_config import load
from tests.end_to_end.conftest import Cluster, eventually

pytestmark = [pytest.mark.containers, pytest.mark.timeout(300)]

FIRST, LAST = 5, 50
BROKEN_EVERY = 4
"""Every fourth deploy is rolled back: the way back must not leak either."""
QUIET_S = 60.0


def manifest(number: int, *, broken: bool) -> str:
    ends = 'EXIT_AFTER_MS = "1"; ' if broken else ""
    return f'''
service "web" {{
  image = "REG/web:v1"
  port = 3000; replicas = 2; cpu = 0.02; memory = "16M"; bake = "10ms"
  env {{ {ends}ROUND = "{number}" }}
  health {{ path = "/health"; interval = "1s" }}
  route "app.example.com" {{ path = "/" }}
}}
service "job" {{
  image = "REG/api:v1"
  cpu = 0.02; memory = "16M"; bake = "10ms"
  env {{ ROUND = "{number}" }}
}}
'''


async def test_fifty_deploys_leave_what_five_left(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(1, FIRST + 1):
        await deploy(cluster, number)
    first = await settled(cluster)
    for number in range(FIRST + 1, LAST + 1):
        await deploy(cluster, number)
    newest = Counter[str]()

    async def no_more_than_before() -> bool:
        nonlocal newest
        newest = await census(cluster)
        return not newest - first

    try:
        await eventually(no_more_than_before, QUIET_S)
    except TimeoutError:
        grown = {what: (first[what], newest[what]) for what in sorted(newest - first)}
        pytest.fail(f"after {FIRST} and after {LAST} deploys: {grown}")
    with capsys.disabled():
        print(f"\nafter {FIRST} and {LAST} deploys: "
              + ", ".join(f"{what} {first[what]} {newest[what]}" for what in sorted(first)))
    await cluster.deploy("", prune=True)
    await eventually(lambda: nothing_runs(cluster), QUIET_S)


async def deploy(cluster: Cluster, number: int) -> None:
    broken = number % BROKEN_EVERY == 0
    seen = await cluster.deploy(manifest(number, broken=broken))
    outcome = seen[-1][1].outcome  # type: ignore[attr-defined]  # a step
    assert outcome == ("rolled_back" if broken else "deployed"), seen[-1]


async def settled(cluster: Cluster) -> Counter[str]:
    """The census once only what is live runs, and two in a row are the same."""
    last = Counter[str]()

    async def same_twice() -> bool:
        nonlocal last
        before, last = last, await census(cluster)
        return before == last and last["containers"] == 3

    await eventually(same_twice, QUIET_S)
    return last


async def nothing_runs(cluster: Cluster) -> bool:
    now = await census(cluster)
    return not any(now[what] for what in ("containers", "snapshots", "shims", "cgroups"))


async def census(cluster: Cluster) -> Counter[str]:
    """How many there are of all that a deploy makes, by kind; open files by process."""
    dev = cluster.dev
    now = Counter[str]()
    for name in dev.names:
        config = load(dev.data / name / "node.json")
        async with Containerd(Path(config.containerd), config.namespace,
                              runc_root=Path(config.runc_root)) as client:
            now["containers"] += len(await containers.list_all(client))
            keys = await list_snapshots(client)
            now["snapshots"] += sum(not key.startswith("sha256:") for key in keys)
            now["image layers"] += sum(key.startswith("sha256:") for key in keys)
    now["namespaces"] = sum(dev.tag in path.name for path in Path("/run/netns").iterdir())
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    now["mounts"] = sum(dev.tag in line or str(dev.data) in line for line in mounts)
    now["cgroups"] = sum(
        path.is_dir() for path in Path("/sys/fs/cgroup").glob(f"**/mill-{dev.tag}*/*"))
    for pid, command in processes(cluster):
        if "containerd-shim" in command:
            now["shims"] += 1
            continue
        now["processes"] += 1
        now[f"files of {role(cluster, command)}"] += open_files(pid)
    return now


def processes(cluster: Cluster) -> list[tuple[int, str]]:
    """Every process of the cluster but the containers' own: its folders are in the command line,
    in the environment, or are where it works."""
    marks = (str(cluster.dev.data), str(cluster.dev.run_folder))
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                environment = (entry / "environ").read_bytes().decode(errors="replace")
                works_in = str((entry / "cwd").readlink())
            except OSError:  # it has ended meanwhile
                continue
            if any(mark in command or f"={mark}" in environment or works_in.startswith(mark)
                   for mark in marks):
                found.append((int(entry.name), command))
    return found


def role(cluster: Cluster, command: str) -> str:
    """What a process is, by its command line: its folders made short."""
    short = command.replace(str(cluster.dev.data), "DATA").replace(
        str(cluster.dev.run_folder), "RUN")
    words = [word for word in short.split() if not word.startswith("{")]
    return " ".join(Path(words[0]).name if n == 0 else word[-40:] for n, word in
                    enumerate(words[:5]))


def open_files(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:  # it has ended meanwhile
        return 0
