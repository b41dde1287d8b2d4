"""The leader's links: one gRPC stream to the agent of each node.

A link keeps what its agent last said, by allocation and by image, and wakes whoever waits. It
dials again by itself; after each dial the agent's inventory replaces what was known.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import assert_never
from weakref import WeakValueDictionary

import grpc
import msgspec
import structlog

from reconciler.clock import Clock
from reconciler.errors import Unavailable
from reconciler.executor.agent.orders import (
    LOGS,
    MAX_MESSAGE_BYTES,
    SERVICE,
    SESSION,
    AllocReport,
    Beat,
    Hello,
    Inventory,
    LogLine,
    LogRequest,
    Order,
    PullReport,
    Report,
    decode_report,
    encode,
)
from reconciler.executor.ledger import Ledger

log = structlog.get_logger("mill.links")

REDIAL_S = 0.2
QUEUE = 10_000
"""Orders that may wait for one agent: a whole cluster's allocations, more than any node has."""


@dataclass
class Credentials:
    """PEM bytes with which this node speaks to agents. A channel keeps those it was made with;
    `serial` counts their renewals, so that whoever keeps a channel can tell."""

    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)
    serial: int = 0

    def renew(self, ca: bytes, certificate: bytes, key: bytes) -> None:
        """For channels from now on."""
        self.ca, self.certificate, self.key = ca, certificate, key
        self.serial += 1

    def channel(self, address: str, node: str) -> grpc.aio.Channel:
        """A channel to `node`'s agent; its certificate must name that node."""
        return grpc.aio.secure_channel(
            address,
            grpc.ssl_channel_credentials(self.ca, self.key, self.certificate),
            options=[
                ("grpc.ssl_target_name_override", node),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 500),
                ("grpc.keepalive_time_ms", 5_000),
                ("grpc.keepalive_timeout_ms", 5_000),
            ],
        )


@dataclass
class Link:
    """What one agent last said, and the way to it."""

    node: str
    address: str
    clock: Clock
    wake: Callable[[], None]
    connected: bool = False
    heard: bool = False
    last_seen_ms: int = 0
    seen_at: float = 0.0
    allocs: dict[str, AllocReport] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    pulls: dict[tuple[str, str], PullReport] = field(default_factory=dict)
    images: set[tuple[str, str]] = field(default_factory=set)
    edge_index: int = 0
    edge_error: str = ""
    log_error: str = ""
    busy: frozenset[str] = frozenset()
    orders: asyncio.Queue[Order] = field(default_factory=lambda: asyncio.Queue(QUEUE))

    def send(self, order: Order) -> None:
        """Queue an order. One that is lost with the stream is sent again by whoever still wants
        it, because everybody looks at reports, not at what was sent."""
        with contextlib.suppress(asyncio.QueueFull):
            self.orders.put_nowait(order)

    def hear(self, report: Report) -> str | None:
        """Take a report in; the allocation that it tells of, "" for none, None for all."""
        self.last_seen_ms, self.seen_at = self.clock.wall_ms(), self.clock.monotonic()
        self.heard = True
        whose: str | None = ""
        match report:
            case Inventory():
                whose = None
                self.allocs = {r.alloc: r for r in report.allocs}
                self.gone.clear()
                self.images = set(report.images)
                self.pulls.clear()
                self.connected = True
            case AllocReport():
                whose = report.alloc
                if report.phase == "absent":
                    self.allocs.pop(report.alloc, None)
                    self.gone.add(report.alloc)
                else:
                    self.allocs[report.alloc] = report
                    self.gone.discard(report.alloc)
            case PullReport():
                self.pulls[report.image, report.digest] = report
                if report.state == "done":
                    self.images.add((report.image, report.digest))
            case Beat():
                self.edge_index = max(self.edge_index, report.edge_index)
                self.edge_error = report.edge_error
                self.log_error = report.log_error
                self.busy = frozenset(report.busy)
            case _:
                assert_never(report)
        self.wake()
        return whose


class Links:
    """Links to all nodes of the state, while this node leads in `term`.

    `led`: whether it surely leads at this moment. Asked before each order, for a process that was
    paused wakes with orders in its hands.
    """

    def __init__(
        self, ledger: Ledger, me: str, credentials: Credentials, clock: Clock,
        led: Callable[[], bool] = lambda: True,
    ) -> None:
        self._led = led
        self._ledger = ledger
        self._me = me
        self._credentials = credentials
        self._clock = clock
        self._links: dict[str, Link] = {}
        self._moved = asyncio.Event()
        self._moved_of: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()

    def __getitem__(self, node: str) -> Link:
        return self._links[node]

    def get(self, node: str) -> Link | None:
        """The link to a node, if there is one."""
        return self._links.get(node)

    def all(self) -> list[Link]:
        """All links, by node name."""
        return [self._links[name] for name in sorted(self._links)]

    def wake(self) -> None:
        """Tell those who wait for any report that there was one."""
        self._moved.set()
        self._moved = asyncio.Event()

    def wake_watchers(self, alloc: str | None) -> None:
        """Tell those who watch `alloc`, or any (None), as when a stream begins or ends."""
        for one in list(self._moved_of) if alloc is None else (alloc,):
            event = self._moved_of.pop(one, None)
            if event is not None:
                event.set()

    @property
    def moved(self) -> asyncio.Event:
        """Set at the next report; take it before looking, then wait."""
        return self._moved

    def moved_of(self, alloc: str) -> asyncio.Event:
        """Set at the next report of that allocation, or of any at once. For those who watch one
        of many: if each of n woke at all reports of n, a deploy would cost n²."""
        return self._moved_of.setdefault(alloc, asyncio.Event())

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until `holds`, looked at after each report. No deadline of its own."""
        while True:
            moved = self._moved
            if holds():
                return
            await moved.wait()

    async def run(self, term: int) -> None:
        """Keep one stream to each node until cancelled."""
        async with asyncio.TaskGroup() as group:
            tasks: dict[str, asyncio.Task[None]] = {}
            async for state in self._ledger.states():
                for gone in sorted(tasks.keys() - state.nodes.keys()):
                    tasks.pop(gone).cancel()
                    self._links.pop(gone, None)
                for node in state.nodes.values():
                    link = self._links.get(node.name)
                    dialled = node.name in tasks
                    if dialled and link is not None and link.address == node.agent:
                        continue
                    if dialled:
                        tasks[node.name].cancel()
                    # A new leader counts every node as seen at its election.
                    link = Link(node.name, node.agent, self._clock, self.wake,
                                last_seen_ms=self._clock.wall_ms(),
                                seen_at=self._clock.monotonic())
                    self._links[node.name] = link
                    tasks[node.name] = group.create_task(self._keep(link, term))

    async def _keep(self, link: Link, term: int) -> None:
        channel, serial = None, -1
        try:
            while True:
                if channel is None or serial != self._credentials.serial:
                    if channel is not None:
                        await channel.close()
                    serial = self._credentials.serial
                    channel = self._credentials.channel(link.address, link.node)
                try:
                    await self._session(channel, link, term)
                except grpc.aio.AioRpcError as error:
                    if link.connected:
                        log.warning("agent_away", node=link.node, code=error.code().name,
                                    detail=(error.details() or "")[:200])
                except asyncio.CancelledError:
                    task = asyncio.current_task()
                    if task is None or task.cancelling():
                        raise
                    log.warning("session_cut", node=link.node)  # the call's end, not ours
                except Exception:
                    # One message that nobody can read must not cost the links to all nodes.
                    log.exception("session_failed", node=link.node)
                finally:
                    link.connected = False
                    link.orders = asyncio.Queue(QUEUE)
                    self.wake()
                    self.wake_watchers(None)
                await asyncio.sleep(REDIAL_S)
        finally:
            if channel is not None:
                await channel.close()

    async def _session(self, channel: grpc.aio.Channel, link: Link, term: int) -> None:
        call = channel.stream_stream(
            f"/{SERVICE}/{SESSION}", request_serializer=encode,
            response_deserializer=decode_report,
        )(wait_for_ready=False)
        await call.write(Hello(term, self._me))
        sender = asyncio.create_task(_send(call, link.orders, self._led))
        # Without its sender a session is deaf: it ends, and the next one starts from what is.
        sender.add_done_callback(lambda _: call.cancel())
        try:
            async for report in call:
                self.wake_watchers(link.hear(report))
        finally:
            sender.cancel()
            call.cancel()


async def _send(
    call: grpc.aio.StreamStreamCall[Order, Report], orders: asyncio.Queue[Order],
    led: Callable[[], bool],
) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        while True:
            order = await orders.get()
            if not led():
                return  # as after a pause: what was decided before it may be over
            await call.write(order)


class LogReader:
    """Lines of any allocation, from the agent of its node; any node may ask."""

    def __init__(self, ledger: Ledger, credentials: Credentials) -> None:
        self._ledger = ledger
        self._credentials = credentials

    async def follow(self, node: str, request: LogRequest) -> AsyncGenerator[LogLine, None]:
        """The lines; Unavailable where the node does not answer."""
        record = self._ledger.state.nodes.get(node)
        if record is None:
            raise Unavailable(f"no node {node}")
        async with self._credentials.channel(record.agent, node) as channel:
            call = channel.unary_stream(
                f"/{SERVICE}/{LOGS}", request_serializer=encode,
                response_deserializer=_line_decoder.decode,
            )(request)
            try:
                async for line in call:
                    yield line
            except grpc.aio.AioRpcError as error:
                raise Unavailable(
                    f"{node} does not give its logs: {error.details() or error.code().name}",
                    hint="look at it with: mill nodes",
                ) from error
            finally:
                call.cancel()


_line_decoder = msgspec.msgpack.Decoder(LogLine)
