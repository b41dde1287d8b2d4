"""What containers wrote: one service's allocations, or one allocation, as a stream of lines."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncGenerator

import structlog
from starlette.responses import Response

from reconciler.api import replies
from reconciler.api.calls import Asked, Call, Query
from reconciler.api.services import Backend, LogLine
from reconciler.api.stream import encode
from reconciler.api.types import LogRow
from reconciler.errors import MillError, NotFound
from reconciler.fsm.records import ENDED, Allocation
from reconciler.fsm.state import State, sorted_by_id

log = structlog.get_logger("mill.api")

DEFAULT_TAIL = 100
MAX_TAIL = 10_000
MAX_WAITING_LINES = 1_000
"""Lines read but not sent yet; a slow reader slows the reading, not this node's memory."""
REMARK = "mill"
"""The `stream` of a line that no container wrote."""


async def follow(asked: Asked) -> Response:
    """Lines of every allocation that runs, or with `previous` of those that ended last."""
    state = await asked.confirmed()
    name = asked.path("name")
    chosen = _chosen(state, name, previous=asked.flag("previous"))
    tail = asked.integer("tail", DEFAULT_TAIL)
    if asked.flag("follow"):
        lines = _followed(asked.backend, name, chosen, tail)
    else:
        lines = _merged(asked.backend, chosen, tail)
    return replies.events(asked, _frames(lines))


def _chosen(state: State, name: str, *, previous: bool) -> list[Allocation]:
    if name in state.allocations:
        return [state.allocations[name]]
    ours = [alloc for alloc in sorted_by_id(state.allocations) if alloc.service == name]
    if not ours and name not in state.services:
        raise NotFound(f"no service or allocation {name}", hint="list them with: mill ps")
    running = [alloc for alloc in ours if alloc.status not in ENDED]
    # A service of which nothing runs any more is asked about because of how it ended.
    return _ended_last(ours) if previous or not running else running


def _ended_last(allocations: list[Allocation]) -> list[Allocation]:
    newest: dict[int, Allocation] = {}
    for alloc in allocations:
        if alloc.status in ENDED:
            other = newest.get(alloc.slot)
            if other is None or alloc.ended_ms > other.ended_ms:
                newest[alloc.slot] = alloc
    return [newest[slot] for slot in sorted(newest)]


async def _frames(lines: AsyncGenerator[LogLine, None]) -> AsyncGenerator[bytes, None]:
    try:
        async for line in lines:
            yield encode("log", LogRow(line.ts, line.alloc, line.stream, line.line))
    finally:
        await lines.aclose()


async def _merged(
    backend: Backend, chosen: list[Allocation], tail: int
) -> AsyncGenerator[LogLine, None]:
    """What is there now, all allocations in one order of time."""
    readers = [_read(backend, alloc, tail, follow=False) for alloc in chosen]
    heap: list[tuple[str, int, LogLine]] = []
    try:
        for number, reader in enumerate(readers):
            async for line in reader:
                heap.append((line.ts, number, line))
                break
        heapq.heapify(heap)
        while heap:
            _, number, line = heap[0]
            yield line
            following = await anext(readers[number], None)
            if following is None:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (following.ts, number, following))
    finally:
        for reader in readers:
            await reader.aclose()


async def _followed(
    backend: Backend, name: str, chosen: list[Allocation], tail: int
) -> AsyncGenerator[LogLine, None]:
    """Lines as they come, allocations that a later deploy starts included."""
    queue: asyncio.Queue[LogLine | None] = asyncio.Queue(MAX_WAITING_LINES)

    async def read(alloc: Allocation, lines: int) -> None:
        async for line in _read(backend, alloc, lines, follow=True):
            await queue.put(line)

    async def watch() -> None:
        """Read each allocation once; of a single one that was named, nothing comes after it."""
        try:
            async with asyncio.TaskGroup() as group:
                for alloc in chosen:
                    group.create_task(read(alloc, tail))
                known = {alloc.id for alloc in chosen}
                state = backend.ledger.state
                while name not in known and name in state.services:
                    for alloc in state.of_service(name):
                        if alloc.id not in known:
                            known.add(alloc.id)
                            group.create_task(read(alloc, MAX_TAIL))
                    state = await backend.ledger.changed(state)
        except* Exception as errors:  # noqa: BLE001 - the edge of this stream's own loop
            log.error("log_stream_failed", name=name, errors=[repr(e) for e in errors.exceptions])
        await queue.put(None)

    watcher = asyncio.create_task(watch())
    try:
        while (line := await queue.get()) is not None:
            yield line
    finally:
        watcher.cancel()
        await asyncio.wait({watcher})


async def _read(
    backend: Backend, alloc: Allocation, tail: int, *, follow: bool
) -> AsyncGenerator[LogLine, None]:
    """One allocation's lines; where they cannot be had, a remark says so and the rest goes on."""
    lines = backend.logs.follow(alloc, tail, follow)
    try:
        async for line in lines:
            yield line
    except MillError as error:
        log.warning("logs_unavailable", alloc=alloc.id, node=alloc.node, reason=error.what)
        now = replies.rfc3339(backend.clock.wall_ms())
        yield LogLine(now, alloc.id, REMARK, f"cannot be read from {alloc.node}: {error.what}")
    finally:
        if isinstance(lines, AsyncGenerator):  # at once: it holds a connection to the node
            await lines.aclose()


CALLS = (
    Call(
        "GET", "/v1/logs/{name}", follow, "What a service or an allocation wrote", role="read",
        serve="read", streams="LogRow",
        query=(
            Query("follow", "go on with each new line", "flag"),
            Query("tail", "how many lines of each allocation to begin with", "integer",
                  low=0, high=MAX_TAIL),
            Query("previous", "of the allocations that ended last", "flag"),
        ),
    ),
)
