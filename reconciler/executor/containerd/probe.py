"""A command run inside a container: for health checks, and for a person's hands."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal

import msgspec
from google.protobuf import any_pb2

from reconciler.executor.containerd import rpc
from reconciler.executor.containerd.client import Absent, Containerd, RuntimeFailed
from reconciler.executor.containerd.generated import containers_pb2
from reconciler.executor.containerd.generated import tasks_pb2 as pb

_PROCESS_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/Process"
_KILLED_S = 10.0


async def exec_probe(
    client: Containerd,
    container_id: str,
    args: tuple[str, ...],
    timeout_s: float,
    *,
    stdout: str = "",
    stderr: str = "",
) -> int | None:
    """Run `args` as the container's user, in its folder and environment; the exit code.

    None when it was killed at `timeout_s`. Its output is dropped, or goes to two
    fifos, which have to be open for reading by now. Raises
    `Absent` when the container does not run, `RuntimeFailed` when there is no such program.
    """
    exec_id = f"probe-{secrets.token_hex(6)}"
    ask = pb.ExecProcessRequest(
        container_id=container_id,
        exec_id=exec_id,
        stdout=stdout,
        stderr=stderr,
        spec=await _process(client, container_id, args),
    )
    await client.call_uncut(rpc.TASK_EXEC, ask)
    try:
        started = pb.StartRequest(container_id=container_id, exec_id=exec_id)
        await client.call_uncut(rpc.TASK_START, started)
        return await _await_end(client, container_id, exec_id, timeout_s)
    finally:
        await _forget(client, container_id, exec_id)


async def _process(client: Containerd, container_id: str, args: tuple[str, ...]) -> any_pb2.Any:
    ask = containers_pb2.GetContainerRequest(id=container_id)
    record = (await client.call(rpc.CONTAINER_GET, ask)).container
    process = msgspec.json.decode(record.spec.value)["process"] | {"args": list(args)}
    return any_pb2.Any(type_url=_PROCESS_TYPE, value=msgspec.json.encode(process))


async def _await_end(
    client: Containerd, container_id: str, exec_id: str, timeout_s: float
) -> int | None:
    ask = pb.WaitRequest(container_id=container_id, exec_id=exec_id)
    ending = asyncio.ensure_future(client.call(rpc.TASK_WAIT, ask, timeout_s=None))
    try:
        done, _ = await asyncio.wait({ending}, timeout=timeout_s)
        if done:
            return ending.result().exit_status
        await _kill(client, container_id, exec_id)
        await asyncio.wait({ending}, timeout=_KILLED_S)
        return None
    finally:
        ending.cancel()


async def _kill(client: Containerd, container_id: str, exec_id: str) -> None:
    ask = pb.KillRequest(container_id=container_id, exec_id=exec_id, signal=signal.SIGKILL)
    with contextlib.suppress(RuntimeFailed):  # it ended in this very moment
        await client.call_uncut(rpc.TASK_KILL, ask)


async def _forget(client: Containerd, container_id: str, exec_id: str) -> None:
    """Delete the process, killed first if its caller was cancelled before it ended."""
    ask = pb.DeleteProcessRequest(container_id=container_id, exec_id=exec_id)
    try:
        await client.call_uncut(rpc.TASK_DELETE_EXEC, ask)
    except Absent:
        return
    except RuntimeFailed:
        await _kill(client, container_id, exec_id)
        with contextlib.suppress(RuntimeFailed):  # with the container it goes in any case
            await client.call_uncut(rpc.TASK_DELETE_EXEC, ask)
