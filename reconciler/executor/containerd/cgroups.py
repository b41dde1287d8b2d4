"""What containers use and what the kernel did to them, on cgroup v1 and v2 hosts.

cgroup v2 has never run: its side is held by stored messages and files alone.
"""

from __future__ import annotations

import contextlib
import os
import re
from functools import cache
from pathlib import Path

import msgspec
from google.protobuf.any_pb2 import Any

from reconciler.executor.containerd import rpc
from reconciler.executor.containerd.client import Containerd
from reconciler.executor.containerd.generated import cgroups1_pb2, cgroups2_pb2
from reconciler.executor.containerd.generated import tasks_pb2 as pb

CGROUP_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED_BYTES = 1 << 60
"""cgroup v1 says 'no limit' with a figure near 2**63, v2 with 2**64 - 1."""


class Usage(msgspec.Struct, frozen=True):
    """What one container uses: `cpu_ns` since its start, `memory_bytes` without idle file cache.

    `memory_limit_bytes` is 0 where there is none. `oom_kills` counts processes that the kernel
    killed at the memory limit, since the start; `throttled_ns` the time cut off by the cpu limit.
    """

    cpu_ns: int
    throttled_ns: int
    memory_bytes: int
    memory_limit_bytes: int
    oom_kills: int
    pids: int


async def usage(client: Containerd, container_id: str) -> Usage | None:
    """What one running container uses; None for one that does not run."""
    return (await _metrics(client, [f"id=={container_id}"])).get(container_id)


async def usage_of_all(client: Containerd) -> dict[str, Usage]:
    """What each running container of the namespace uses, in one call, by id."""
    return await _metrics(client, [])


@cache
def host_cgroup_version() -> int:
    """2 where the unified hierarchy is the whole of it, else 1."""
    return 2 if (CGROUP_ROOT / "cgroup.controllers").exists() else 1


def read_usage(data: Any) -> Usage | None:
    """A task's metrics, of either cgroup version; None for a kind that is neither."""
    kind = data.type_url.rpartition("/")[2]
    if kind == "io.containerd.cgroups.v1.Metrics":
        return _usage_v1(cgroups1_pb2.Metrics.FromString(data.value))
    if kind == "io.containerd.cgroups.v2.Metrics":
        return _usage_v2(cgroups2_pb2.Metrics.FromString(data.value))
    return None


def oom_kills(cgroup: str, root: Path = CGROUP_ROOT) -> int:
    """Processes killed for lack of memory in a container's cgroup, as the kernel counts them.

    Events are not replayed, so this tells of a kill while no agent ran. The count goes with the
    task: read it before `remove`. 0 where the cgroup is gone.
    """
    relative = cgroup.lstrip("/")
    for file in (
        root / "memory" / relative / "memory.oom_control",
        root / relative / "memory.events",
    ):
        with contextlib.suppress(OSError):
            found = re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)
            return int(found[1]) if found else 0
    return 0


def remove_cgroup(cgroup: str, root: Path = CGROUP_ROOT) -> None:
    """Remove a cgroup and those below it, as far as they are empty, in every hierarchy.

    runc removes the container's own and leaves its parents behind.
    """
    relative = cgroup.strip("/")
    if not relative:
        raise ValueError("the root of all cgroups is not ours to remove")
    for top in {root / relative, *root.glob(f"*/{relative}")}:
        for folder, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()


async def _metrics(client: Containerd, filters: list[str]) -> dict[str, Usage]:
    answer = await client.call(rpc.TASK_METRICS, pb.MetricsRequest(filters=filters))
    read = {metric.id: read_usage(metric.data) for metric in answer.metrics}
    return {name: used for name, used in sorted(read.items()) if used is not None}


def _usage_v1(told: cgroups1_pb2.Metrics) -> Usage:
    memory = told.memory
    return Usage(
        cpu_ns=told.cpu.usage.total,
        throttled_ns=told.cpu.throttling.throttled_time,
        memory_bytes=max(memory.usage.usage - memory.total_inactive_file, 0),
        memory_limit_bytes=_limit(memory.usage.limit),
        oom_kills=told.memory_oom_control.oom_kill,
        pids=told.pids.current,
    )


def _usage_v2(told: cgroups2_pb2.Metrics) -> Usage:
    memory = told.memory
    return Usage(
        cpu_ns=told.cpu.usage_usec * 1000,
        throttled_ns=told.cpu.throttled_usec * 1000,
        memory_bytes=max(memory.usage - memory.inactive_file, 0),
        memory_limit_bytes=_limit(memory.usage_limit),
        oom_kills=told.memory_events.oom_kill,
        pids=told.pids.current,
    )


def _limit(value: int) -> int:
    return 0 if value >= _UNLIMITED_BYTES else value
