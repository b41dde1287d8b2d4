"""Containers: made, started, stopped, removed, listed; each step may happen twice.

A container is a snapshot, a record and a task, made in this order and removed in the other. A
crash between any two steps leaves what the same call, made again, completes. A call that is
cancelled still makes its steps, and the next call for the same container awaits them: half a
Create would otherwise finish after the removal that followed it, seen by nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from google.protobuf import any_pb2

from reconciler.executor.containerd import rpc
from reconciler.executor.containerd.cgroups import host_cgroup_version
from reconciler.executor.containerd.client import (
    Absent,
    AlreadyThere,
    Containerd,
    RuntimeFailed,
    ShimGone,
)
from reconciler.executor.containerd.generated import (
    containers_pb2,
    runc_options_pb2,
    snapshots_pb2,
    task_pb2,
    types_pb2,
)
from reconciler.executor.containerd.generated import tasks_pb2 as pb
from reconciler.executor.containerd.image_user import find_user
from reconciler.executor.containerd.signals import kill, read_signal, signal_until_heard
from reconciler.executor.containerd.snapshot import (
    EXTRACT_PREFIX,
    list_snapshots,
    remove_snapshot,
)
from reconciler.executor.containerd.spec import ContainerSpec, runtime_spec
from reconciler.executor.containerd.watch import Exit, epoch_ms, wait

SPEC_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
_RUNTIME = "io.containerd.runc.v2"
_STDOUT, _STDERR, _STOP_SIGNAL = "mill.stdout", "mill.stderr", "mill.stop-signal"

_KEPT = {"containerd.io/gc.root": "mill"}
"""Keeps a container's snapshot from collection until its record names it. A lease would do so too,
for two more writes to containerd's database, which cost half of a prepare."""

_KILLED_S = 15.0
"""After SIGKILL a process ends at once, unless the disk it writes to hangs."""

_CREATE_TRIES, _CREATE_PAUSE_S = 4, 1.5
"""The daemon clears what a cut-off Create left behind after 2 to 3 s."""

_SHIM_TRIES, _SHIM_PAUSE_S = 50, 0.2
"""The daemon cleans up behind a dead shim within 5 s, its own limit for that."""

T = TypeVar("T")

_STATUS = {
    task_pb2.CREATED: "created",
    task_pb2.RUNNING: "running",
    task_pb2.STOPPED: "stopped",
    task_pb2.PAUSED: "paused",
    task_pb2.PAUSING: "paused",
}


class ContainerState(msgspec.Struct, frozen=True):
    """A container as it is now.

    `status` is 'prepared' (no task yet), 'created', 'running', 'paused', 'stopped' or 'unknown';
    `exit` is there once it stopped. `recorded` is False for a task whose record is gone (`sweep`).
    """

    id: str
    image: str
    labels: dict[str, str]
    status: str
    pid: int = 0
    exit: Exit | None = None
    recorded: bool = True


async def create_and_start(client: Containerd, spec: ContainerSpec) -> int:
    """Have the container running; its pid on this host. A stopped one is started anew, in place.

    Raises `RuntimeFailed` with runc's reason (no such program, no such mount); then `remove` it.
    """
    await prepare(client, spec)
    return await start(client, spec.id)


async def prepare(client: Containerd, spec: ContainerSpec) -> None:
    """Make snapshot and record, which `start` needs; may be done well ahead of it.

    A record that is there already stays as it is.
    """
    await client.finish(_prepare(client, spec))


async def start(client: Containerd, container_id: str) -> int:
    """Have a prepared container running; its pid on this host."""
    return await client.finish(_start(client, container_id))


async def stop(client: Containerd, container_id: str, grace_s: float) -> Exit | None:
    """End the container's processes: the stop signal, and SIGKILL once `grace_s` is over.

    Its record and exit code stay, for `list_all` and a later `start`. None when nothing ran.
    """
    return await _past_dead_shims(lambda: _stop(client, container_id, grace_s))


async def remove(client: Containerd, container_id: str, grace_s: float = 0.0) -> None:
    """Stop the container and forget it: task, record, snapshot. What is gone already is fine."""
    await stop(client, container_id, grace_s)
    await client.finish(_past_dead_shims(lambda: _forget(client, container_id)))


async def list_all(client: Containerd) -> list[ContainerState]:
    """All containers of the namespace, by id, running or not."""
    asked = containers_pb2.ListContainersRequest()
    records = (await client.call(rpc.CONTAINER_LIST, asked)).containers
    processes = (await client.call(rpc.TASK_LIST, pb.ListTasksRequest())).tasks
    # In a list the id of the task's process is the container's; containerd leaves container_id ''.
    tasks = {process.id: process for process in processes}
    states = [_state(record, tasks.pop(record.id, None)) for record in records]
    states += [_unrecorded(process) for process in tasks.values()]
    return sorted(states, key=lambda state: state.id)


async def sweep(client: Containerd) -> list[str]:
    """Clear away what a crash left half-made, for the start of an agent; the ids removed.

    Tasks without a record, which no call but a list sees, get one back for as long as their
    removal takes. Call it while nothing else works in the namespace.
    """
    states = await list_all(client)
    orphans = [state.id for state in states if not state.recorded]
    for container_id in orphans:
        await _adopt(client, container_id)
        await remove(client, container_id)
    kept = {state.id for state in states if state.recorded}
    keys = [key for key in await list_snapshots(client) if not key.startswith("sha256:")]
    stale = [key for key in keys if key.startswith(EXTRACT_PREFIX) or key not in kept]
    for key in stale:
        await remove_snapshot(client, key)
    return sorted({*orphans, *stale})


async def _prepare(client: Containerd, spec: ContainerSpec) -> None:
    for fifo in (spec.stdout, spec.stderr):
        _ensure_fifo(fifo)
    async with _alone(client, spec.id):
        user_mounts = await _ensure_snapshot(client, spec)
        user = find_user(spec.image.config.user if spec.user is None else spec.user, user_mounts)
        cgroup_v2 = host_cgroup_version() == 2
        oci = runtime_spec(spec, user, cgroup_v2=cgroup_v2)
        record = containers_pb2.Container(
            id=spec.id,
            image=spec.image.name,
            labels=spec.labels
            | {_STDOUT: spec.stdout, _STDERR: spec.stderr}
            | {_STOP_SIGNAL: spec.image.config.stop_signal},
            snapshotter=client.snapshotter,
            snapshot_key=spec.id,
            runtime=_runtime(client),
            spec=any_pb2.Any(type_url=SPEC_TYPE, value=msgspec.json.encode(oci)),
        )
        with contextlib.suppress(AlreadyThere):
            ask = containers_pb2.CreateContainerRequest(container=record)
            await client.call_uncut(rpc.CONTAINER_CREATE, ask)


async def _start(client: Containerd, container_id: str) -> int:
    async with _alone(client, container_id):
        for tries_left in reversed(range(_CREATE_TRIES)):
            try:
                pid = await _create_task(client, container_id)
                break
            except AlreadyThere:
                running = await _resume_task(client, container_id)
                if running is not None:
                    return running
            except RuntimeFailed as error:
                if "file exists" not in error.what or not tries_left:
                    raise
                await asyncio.sleep(_CREATE_PAUSE_S)
        else:
            raise RuntimeFailed("its task comes and goes: two agents order it", at=container_id)
        await client.call_uncut(rpc.TASK_START, pb.StartRequest(container_id=container_id))
        return pid


async def _stop(client: Containerd, container_id: str, grace_s: float) -> Exit | None:
    async with _alone(client, container_id):
        process = await _process(client, container_id)
    if process is None:
        return None
    if process.status == task_pb2.CREATED:
        # It never ran: there is no handler to wait for, and Wait would hang until it starts.
        grace_s = 0.0
    ending = asyncio.ensure_future(wait(client, container_id))
    try:
        if grace_s > 0 and process.status != task_pb2.STOPPED:
            number = await _stop_signal(client, container_id)
            await signal_until_heard(client, container_id, process.pid, number, ending, grace_s)
        if not ending.done():
            await kill(client, container_id, signal.SIGKILL, everything=True)
        return await asyncio.wait_for(ending, _KILLED_S)
    except TimeoutError as error:
        hint = "a process that hangs in the kernel, on a disk that does not answer, cannot be ended"
        raise RuntimeFailed("it does not end after SIGKILL", at=container_id, hint=hint) from error
    except Absent:
        return None
    finally:
        ending.cancel()


async def _forget(client: Containerd, container_id: str) -> None:
    async with _alone(client, container_id):
        with contextlib.suppress(Absent):
            ask = pb.DeleteTaskRequest(container_id=container_id)
            await client.call_uncut(rpc.TASK_DELETE, ask)
        with contextlib.suppress(Absent):
            gone = containers_pb2.DeleteContainerRequest(id=container_id)
            await client.call_uncut(rpc.CONTAINER_DELETE, gone)
        await remove_snapshot(client, container_id)


async def _past_dead_shims(step: Callable[[], Awaitable[T]]) -> T:
    """Do a step again while the daemon has yet to notice that the container's shim is dead."""
    for _ in range(_SHIM_TRIES):
        with contextlib.suppress(ShimGone):
            return await step()
        await asyncio.sleep(_SHIM_PAUSE_S)
    return await step()


def _alone(client: Containerd, container_id: str) -> asyncio.Lock:
    """Held by what makes or removes one container's parts."""
    return client.lock(f"container {container_id}")


async def _ensure_snapshot(client: Containerd, spec: ContainerSpec) -> list[types_pb2.Mount]:
    ask = snapshots_pb2.PrepareSnapshotRequest(
        snapshotter=client.snapshotter, key=spec.id, parent=spec.image.chain_id, labels=_KEPT
    )
    try:
        return list((await client.call_uncut(rpc.SNAPSHOT_PREPARE, ask)).mounts)
    except AlreadyThere:
        return await _mounts(client, spec.id)


async def _mounts(client: Containerd, key: str) -> list[types_pb2.Mount]:
    ask = snapshots_pb2.MountsRequest(snapshotter=client.snapshotter, key=key)
    return list((await client.call(rpc.SNAPSHOT_MOUNTS, ask)).mounts)


async def _create_task(client: Containerd, container_id: str) -> int:
    record, rootfs = await asyncio.gather(
        _record(client, container_id), _mounts(client, container_id)
    )
    stdout, stderr = record.labels.get(_STDOUT, ""), record.labels.get(_STDERR, "")
    ask = pb.CreateTaskRequest(
        container_id=container_id, rootfs=rootfs, stdout=stdout, stderr=stderr
    )
    with _readers(stdout, stderr):
        return (await client.call_uncut(rpc.TASK_CREATE, ask)).pid


async def _resume_task(client: Containerd, container_id: str) -> int | None:
    """The pid of the task that is there; None when there is none (any more) to go on with."""
    process = await _process(client, container_id)
    if process is None:
        return None
    if process.status == task_pb2.CREATED:
        await client.call_uncut(rpc.TASK_START, pb.StartRequest(container_id=container_id))
        return process.pid
    if process.status != task_pb2.STOPPED:
        return process.pid
    with contextlib.suppress(Absent):
        await client.call_uncut(rpc.TASK_DELETE, pb.DeleteTaskRequest(container_id=container_id))
    return None


async def _record(client: Containerd, container_id: str) -> containers_pb2.Container:
    ask = containers_pb2.GetContainerRequest(id=container_id)
    return (await client.call(rpc.CONTAINER_GET, ask)).container


async def _process(client: Containerd, container_id: str) -> task_pb2.Process | None:
    try:
        return (await client.call(rpc.TASK_GET, pb.GetRequest(container_id=container_id))).process
    except Absent:
        return None


async def _stop_signal(client: Containerd, container_id: str) -> signal.Signals:
    try:
        name = (await _record(client, container_id)).labels.get(_STOP_SIGNAL, "")
    except Absent:
        name = ""
    return read_signal(name)


async def _adopt(client: Containerd, container_id: str) -> None:
    """Give a task without a record a record and a snapshot, so that it can be removed."""
    ask = snapshots_pb2.PrepareSnapshotRequest(
        snapshotter=client.snapshotter, key=container_id, labels=_KEPT
    )
    with contextlib.suppress(AlreadyThere):
        await client.call_uncut(rpc.SNAPSHOT_PREPARE, ask)
    record = containers_pb2.Container(
        id=container_id,
        snapshotter=client.snapshotter,
        snapshot_key=container_id,
        runtime=_runtime(client),
        spec=any_pb2.Any(type_url=SPEC_TYPE, value=b"{}"),
    )
    with contextlib.suppress(AlreadyThere):
        create = containers_pb2.CreateContainerRequest(container=record)
        await client.call_uncut(rpc.CONTAINER_CREATE, create)


def _runtime(client: Containerd) -> containers_pb2.Container.Runtime:
    options = runc_options_pb2.Options(root=str(client.runc_root))
    packed = any_pb2.Any(type_url="containerd.runc.v1.Options", value=options.SerializeToString())
    return containers_pb2.Container.Runtime(name=_RUNTIME, options=packed)


def _ensure_fifo(path: str) -> None:
    """The shim opens what is there; a plain file in a fifo's place would never be read."""
    with contextlib.suppress(FileExistsError):
        os.mkfifo(path, 0o600)
    if not stat.S_ISFIFO(Path(path).stat().st_mode):
        raise RuntimeFailed("not a fifo", at=path, hint="remove what is in its place")


@contextlib.contextmanager
def _readers(*fifos: str) -> Iterator[None]:
    """Hold the fifos open for reading until the shim does so itself, and read nothing.

    The shim opens them for writing first, and fails after some seconds where nobody reads.
    """
    with contextlib.ExitStack() as stack:
        for fifo in filter(None, fifos):
            stack.callback(os.close, os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        yield


def _state(record: containers_pb2.Container, process: task_pb2.Process | None) -> ContainerState:
    state = ContainerState(
        id=record.id, image=record.image, labels=dict(record.labels), status="prepared"
    )
    return state if process is None else msgspec.structs.replace(state, **_running(process))


def _unrecorded(process: task_pb2.Process) -> ContainerState:
    state = ContainerState(id=process.id, image="", labels={}, status="", recorded=False)
    return msgspec.structs.replace(state, **_running(process))


def _running(process: task_pb2.Process) -> dict[str, Any]:
    stopped = process.status == task_pb2.STOPPED
    ended = Exit(process.exit_status, epoch_ms(process.exited_at)) if stopped else None
    status = _STATUS.get(process.status, "unknown")
    return {"status": status, "pid": process.pid, "exit": ended}
