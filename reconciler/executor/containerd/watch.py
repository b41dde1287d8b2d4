"""How a container ends: one shared Wait per task, and the namespace's stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TypeAlias

import msgspec
from google.protobuf.timestamp_pb2 import Timestamp

from reconciler.executor.containerd import rpc
from reconciler.executor.containerd.client import Absent, Containerd, RuntimeFailed
from reconciler.executor.containerd.generated import events_pb2, task_events_pb2, task_pb2
from reconciler.executor.containerd.generated import tasks_pb2 as pb

_LOOK_AGAIN_S = 0.2
"""Pause after an error of Wait: the daemon restarts in less."""


class Exit(msgspec.Struct, frozen=True):
    """How a process ended: its code, or 128 + the signal; `at_ms` since the epoch, UTC."""

    code: int
    at_ms: int


class Exited(msgspec.Struct, frozen=True):
    """The container's first process ended."""

    id: str
    exit: Exit


class OutOfMemory(msgspec.Struct, frozen=True):
    """The kernel killed a process of the container at its memory limit.

    It comes before the `Exited` it causes, and alone where only a child was killed.
    """

    id: str


TaskEvent: TypeAlias = Exited | OutOfMemory


async def wait(client: Containerd, container_id: str) -> Exit:
    """Until the container's process has ended, whether that was before or is to come.

    Goes on over restarts of the daemon. Any number of callers share one call; a caller that is
    cancelled does not end it, because a Wait that is cut leaks memory in the shim.
    Raises `Absent` when there is no such task (any more).
    """
    work = client.shared.get(container_id)
    if work is None:
        work = asyncio.ensure_future(_wait(client, container_id))
        client.shared[container_id] = work
        work.add_done_callback(lambda done: _forget(client, container_id, done))
    return await asyncio.shield(work)


async def events(client: Containerd) -> AsyncGenerator[TaskEvent, None]:
    """Exits and kills for lack of memory in this namespace, from now on; nothing is replayed.

    So subscribe, then list, then follow. A subscription is not acknowledged: an exit at that
    moment is found by `wait`, a kill by `cgroups.oom_kills`. Raises `Silent` when the daemon ends;
    the next call waits for it to come back.
    """
    filters = [f'namespace=={client.namespace},topic=="/tasks/{kind}"' for kind in ("exit", "oom")]
    ask = events_pb2.SubscribeRequest(filters=filters)
    async for envelope in client.stream(rpc.EVENT_SUBSCRIBE, ask):
        event = read_event(envelope)
        if event is not None:
            yield event


def read_event(envelope: events_pb2.Envelope) -> TaskEvent | None:
    """The event of an envelope, or None where it is of no container's first process.

    containerd 1.6 names the type without a host, which `Any.Unpack` does not take.
    """
    kind, value = envelope.event.type_url.rpartition("/")[2], envelope.event.value
    if kind == "containerd.events.TaskOOM":
        return OutOfMemory(task_events_pb2.TaskOOM.FromString(value).container_id)
    if kind != "containerd.events.TaskExit":
        return None
    told = task_events_pb2.TaskExit.FromString(value)
    if told.id != told.container_id:  # an exec's
        return None
    return Exited(told.container_id, Exit(told.exit_status, epoch_ms(told.exited_at)))


def epoch_ms(at: Timestamp) -> int:
    """Milliseconds since the epoch; 0 for the zero time that containerd writes for 'never'."""
    return max(at.ToMilliseconds(), 0)


async def _wait(client: Containerd, container_id: str) -> Exit:
    while True:
        ask = pb.WaitRequest(container_id=container_id)
        try:
            answer = await client.call(rpc.TASK_WAIT, ask, timeout_s=None)
        except Absent:
            raise
        except RuntimeFailed:
            # The daemon or the shim went away, which says nothing about the process: look again.
            ended = await _look(client, container_id)
            if ended is not None:
                return ended
            await asyncio.sleep(_LOOK_AGAIN_S)
        else:
            return Exit(answer.exit_status, epoch_ms(answer.exited_at))


async def _look(client: Containerd, container_id: str) -> Exit | None:
    """The exit of a stopped task; None while it runs or nobody can tell."""
    try:
        answer = await client.call(rpc.TASK_GET, pb.GetRequest(container_id=container_id))
    except Absent:
        raise
    except RuntimeFailed:
        return None
    process = answer.process
    if process.status != task_pb2.STOPPED:
        return None
    return Exit(process.exit_status, epoch_ms(process.exited_at))


def _forget(client: Containerd, container_id: str, done: asyncio.Future[Exit]) -> None:
    if client.shared.get(container_id) is done:
        del client.shared[container_id]
    if not done.cancelled():
        done.exception()  # read: a waiter that was cancelled leaves it to nobody
