"""The agent's door: gRPC with mutual TLS. One session at a time, the newest term's.

An order of an older term than the newest seen is refused, so a leader that slept through its own
deposition can make no agent do anything. Who speaks is what its certificate says, and must be a
node of the state, so that one that was removed is a stranger from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, assert_never

import grpc
import msgspec
import structlog

from reconciler.errors import MillError
from reconciler.executor.agent import authority
from reconciler.executor.agent.door import Door
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
    Pull,
    PullReport,
    Report,
    Start,
    Stop,
    decode_order,
    encode,
)
from reconciler.executor.agent.terms import Terms
from reconciler.fsm.records import Node

log = structlog.get_logger("mill.agent")

BEAT_S = 1.0
"""Node heartbeat (contracts: Defaults)."""
CONFIRMED_S = 0.3
"""Half of the shortest election timeout: so long after a majority answered, nobody else leads."""
REPORTS = 50_000
"""Reports that may wait for a slow leader; a session that lags further is cut and begins anew
with an inventory."""


class Allocations(Protocol):
    """What the door needs of the supervisor."""

    def inventory(self) -> tuple[AllocReport, ...]:
        """All allocations here."""
        ...

    def start(self, order: Start) -> None:
        """Have it run."""
        ...

    def stop(self, alloc: str, *, kill: bool) -> None:
        """Have it gone."""
        ...


class Images(Protocol):
    """What the door needs of the image store."""

    async def present(self) -> tuple[tuple[str, str], ...]:
        """(image, digest) of all that is here."""
        ...

    async def pull(self, order: Pull, tell: Callable[[PullReport], None]) -> None:
        """Fetch, telling progress and, at last, how it went."""
        ...


class Lines(Protocol):
    """What the door needs of the logs."""

    def read(self, request: LogRequest) -> AsyncIterator[LogLine]:
        """Lines of an allocation."""
        ...


class AgentServer:
    """Serves sessions and logs, and, with a `custody`, the cluster's key and new certificates.

    `beat` makes the heartbeat; `floor` is the log's own term; `nodes` are those of the state: while
    there is none, as at the founding, the CA's word is enough. `kept` outlives the process and a
    log that is lost: without it a start knows only the log's term. `confirm` is the term in which
    this node, right now, leads; MillError where it does not.
    """

    def __init__(
        self, node: str, allocations: Allocations, images: Images, lines: Lines,
        beat: Callable[[], Beat], floor: Callable[[], int],
        nodes: Callable[[], Mapping[str, Node]] = dict, custody: authority.Custody | None = None,
        kept: Terms | None = None, confirm: Callable[[], Awaitable[int]] | None = None,
    ) -> None:
        self._node = node
        self._allocations = allocations
        self._images = images
        self._lines = lines
        self._beat = beat
        self._floor = floor
        self._nodes = nodes
        self._custody = custody
        self._kept = kept
        self._confirm = confirm
        self._term = kept.newest() if kept is not None else 0
        self._outbox: asyncio.Queue[Report] | None = None
        self._current: asyncio.Task[object] | None = None
        self._pulls: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._server: grpc.aio.Server | None = None
        self._door = Door(self._admits, self._hosts)
        self._folder: Path | None = None
        self.leader_seen_at = 0.0

    async def start(
        self, address: str, ca: bytes, certificate: bytes, key: bytes, behind: Path | None = None
    ) -> None:
        """Listen; only certificates of the cluster's CA are spoken to.

        `behind`: where the socket between the door and gRPC goes, in a folder that is closed to
        other users; without it, in a new one.
        """
        server = grpc.aio.server(options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ])
        methods: dict[str, Any] = {  # each handler has types of its own
            SESSION: grpc.stream_stream_rpc_method_handler(
                self._session, request_deserializer=decode_order, response_serializer=encode),
            LOGS: grpc.unary_stream_rpc_method_handler(
                self._read_logs, request_deserializer=_log_request.decode,
                response_serializer=encode),
        }
        if self._custody is not None:
            methods |= authority.handlers(self._custody, self._caller)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        if behind is None:
            self._folder = Path(tempfile.mkdtemp(prefix="mill-agent-"))
            behind = self._folder / "agent.sock"
        server.add_insecure_port(f"unix:{behind}")
        await server.start()
        self._server = server
        self._door.show(ca, certificate, key)
        try:
            self._door.open(address, behind)
        except OSError:
            await self.stop()
            raise

    def reload(self, ca: bytes, certificate: bytes, key: bytes) -> None:
        """A new certificate: for connections from now on; those that are open go on."""
        self._door.show(ca, certificate, key)

    async def stop(self) -> None:
        """Close the door; containers stay."""
        if self._server is not None:
            await self._server.stop(0.2)
        await self._door.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        for task in self._pulls.values():
            task.cancel()

    def tell(self, report: Report) -> None:
        """Send a report to the leader, if one listens; else the next inventory says it."""
        outbox = self._outbox
        if outbox is None:
            return
        try:
            outbox.put_nowait(report)
        except asyncio.QueueFull:
            if self._current is not None:
                self._current.cancel()

    def _admits(self, name: str) -> bool:
        nodes = self._nodes()
        return bool(name) and (not nodes or name in nodes)

    def _hosts(self) -> frozenset[str]:
        return frozenset(node.agent.rpartition(":")[0].strip("[]")
                         for node in self._nodes().values())

    def _caller(self, context: grpc.aio.ServicerContext[Any, Any]) -> str:
        """The node whose certificate opened the connection; "" for who came past the door."""
        return self._door.name_of(context.peer())

    def _stranger(self, caller: str) -> str:
        return f"{caller or 'the caller'} is no node of the cluster as {self._node} knows it"

    async def _session(
        self, orders: AsyncIterator[Order], context: grpc.aio.ServicerContext[Order, Report]
    ) -> AsyncIterator[Report]:
        hello = await anext(orders, None)
        if not isinstance(hello, Hello):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a session begins with hello")
            return
        caller = self._caller(context)
        if caller != hello.leader or not self._admits(caller):
            log.warning("session_refused", caller=caller, leader=hello.leader)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, self._stranger(caller)
                                if caller == hello.leader else
                                f"{hello.leader} leads, it says, but speaks as {caller}")
            return
        newest = max(self._term, self._floor())
        if hello.term < newest:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION,
                                f"term {hello.term} is over: the newest is {newest}")
            return
        if self._kept is not None and hello.term > self._term:
            self._kept.keep(hello.term)
        self._term = hello.term
        if self._current is not None:
            self._current.cancel()
        self._current = asyncio.current_task()
        outbox: asyncio.Queue[Report] = asyncio.Queue(REPORTS)
        self._outbox = outbox
        log.info("session", leader=hello.leader, term=hello.term)
        reader = asyncio.create_task(self._obey(self._valid(orders, hello), hello.term))
        beats = asyncio.create_task(self._beats())
        try:
            yield Inventory(node=self._node, allocs=self._allocations.inventory(),
                            images=await self._images.present())
            yield self._beat()
            while not reader.done():
                taking = asyncio.ensure_future(outbox.get())
                try:
                    await asyncio.wait({taking, reader}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not taking.done():
                        taking.cancel()
                if not taking.done() or taking.cancelled():
                    break
                yield taking.result()
        finally:
            reader.cancel()
            beats.cancel()
            if self._outbox is outbox:
                self._outbox = None
                self._current = None

    async def _valid(self, orders: AsyncIterator[Order], hello: Hello) -> AsyncIterator[Order]:
        """The orders of others as they come; this node's own while a majority says that it leads.

        A node that was paused wakes as leader and agent at once: its log still has the term of
        before, so that nothing but a majority can say that another has led since.
        """
        confirmed_at = float("-inf")
        async for order in orders:
            now = asyncio.get_running_loop().time()
            if self._confirm is not None and hello.leader == self._node \
                    and now - confirmed_at > CONFIRMED_S:
                try:
                    leads = await self._confirm() == hello.term
                except MillError:
                    leads = False
                if not leads:
                    log.warning("order_unconfirmed", term=hello.term)
                    return
                confirmed_at = now
            yield order

    async def _obey(self, orders: AsyncIterator[Order], term: int) -> None:
        async for order in orders:
            if term < max(self._term, self._floor()):
                log.warning("order_refused", term=term, newest=max(self._term, self._floor()))
                return
            match order:
                case Hello():
                    return
                case Pull():
                    self._begin_pull(order)
                case Start():
                    self._allocations.start(order)
                case Stop():
                    self._allocations.stop(order.alloc, kill=order.kill)
                case _:
                    assert_never(order)

    def _begin_pull(self, order: Pull) -> None:
        key = (order.image, order.digest)
        if key in self._pulls:
            return  # under way: its reports go to whoever leads now
        task = asyncio.create_task(self._pull(order))
        self._pulls[key] = task
        task.add_done_callback(lambda _: self._pulls.pop(key, None))

    async def _pull(self, order: Pull) -> None:
        """A pull always says how it ended: the leader waits for that."""
        try:
            await self._images.pull(order, self.tell)
        except Exception as error:
            log.exception("pull_failed", image=order.image)
            self.tell(PullReport(image=order.image, digest=order.digest, state="failed",
                                 error=str(error)))

    async def _beats(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            self.tell(self._beat())

    def beat_now(self) -> None:
        """The edge has moved: the leader waits for it, so it hears at once."""
        self.tell(self._beat())

    async def _read_logs(
        self, request: LogRequest, context: grpc.aio.ServicerContext[LogRequest, LogLine]
    ) -> AsyncIterator[LogLine]:
        caller = self._caller(context)
        if not self._admits(caller):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, self._stranger(caller))
        try:
            with contextlib.suppress(asyncio.CancelledError):
                async for line in self._lines.read(request):
                    yield line
        except MillError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, error.what)


_log_request: msgspec.msgpack.Decoder[LogRequest] = msgspec.msgpack.Decoder(LogRequest)
