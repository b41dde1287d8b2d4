"""Streams between leaders and agents over the simulated network, in the place of gRPC's.

The leader's end stands behind the `channel` of its credentials, the agent's end calls the real
session of `AgentServer`. A stream behaves as one over TCP: in order; what is sent into a cut waits
in the kernel and arrives later, even when the sender has given the stream up or was killed; an
end that hears nothing for long is told that the stream is broken, the other end is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from reconciler.executor.agent.orders import (
    Hello,
    Inventory,
    Order,
    Report,
    decode_order,
    decode_report,
    encode,
)
from reconciler.executor.agent.server import AgentServer
from reconciler.executor.links import Credentials

if TYPE_CHECKING:
    from tests.sim.whole.process import Process
    from tests.sim.whole.world import WholeWorld

KEEPALIVE_S = (5.0, 10.0)
"""Silence after which an end gives up: pings each 5 s, answered within 5 s."""
CONNECT_S = (0.5, 3.0)

SESSION_TERM: contextvars.ContextVar[int] = contextvars.ContextVar("session_term")
"""The term of the session whose orders are being obeyed."""

_END = object()


def _error(code: grpc.StatusCode, why: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), why)


class Aborted(Exception):
    """The agent refused the session."""


@dataclass
class Context:
    """What a session needs of gRPC's servicer context; `caller` is what the door found out."""

    caller: str
    code: grpc.StatusCode = grpc.StatusCode.OK
    why: str = ""

    async def abort(self, code: grpc.StatusCode, details: str = "") -> None:
        self.code, self.why = code, details
        raise Aborted(details)


@dataclass
class Way:
    """One direction of a stream: what is in the sender's kernel or on the wire."""

    source: str
    target: str
    flights: deque[tuple[float, str, bytes]] = field(default_factory=deque)
    last_at_s: float = 0.0


class Stream:
    """One stream. `call` is the leader's end, `session` the agent's."""

    def __init__(self, streams: Streams, leader: Process, target: str) -> None:
        self._streams, self._world = streams, streams.world
        self.leader = leader
        self.agent: Process | None = None
        self.down = Way(leader.name, target)
        self.up = Way(target, leader.name)
        self.call = SimCall(self)
        self.incoming: asyncio.Queue[object] = asyncio.Queue()  # the agent's
        self.session: asyncio.Task[None] | None = None
        self.given_up = False  # by the leader's end
        self.over = False
        rng = self._world.rng
        self._answered_s = self._world.now_s
        self._patience_s = rng.uniform(*CONNECT_S)

    def send(self, way: Way, kind: str, data: bytes = b"") -> None:
        """Put something on its way."""
        at_s = max(way.last_at_s, self._world.now_s + self._world.network._delay_s())
        way.last_at_s = at_s
        way.flights.append((at_s, kind, data))

    @property
    def is_gone(self) -> bool:
        """Nobody holds either end."""
        return self.over and (self.session is None or self.session.done())

    def step(self) -> None:
        """Deliver what arrives now; break what has been silent for too long."""
        self._move(self.down, self._at_agent)
        self._move(self.up, self._at_leader)
        self._watch()

    def _move(self, way: Way, arrive: Callable[[str, bytes], bool]) -> None:
        now_s, cut = self._world.now_s, self._streams.cut
        while way.flights and way.flights[0][0] <= now_s and (way.source, way.target) not in cut:
            _, kind, data = way.flights[0]
            if not arrive(kind, data):
                return
            if way.flights:
                way.flights.popleft()

    def _at_agent(self, kind: str, data: bytes) -> bool:
        node = self._world.whole[self.down.target]
        process = node.process
        if not node.powered or (process is not None and node.frozen):
            return False  # nobody answers; or the kernel keeps it for a process that stands still
        if kind == "reset":
            self._close_session()
            return True
        if kind == "open" and process is not None and process.agent is not None:
            self.agent, self._answered_s = process, self._world.now_s
            self._patience_s = self._world.rng.uniform(*KEEPALIVE_S)
            self.session = process.loop.create_task(_serve(self, process.agent))
            return True
        if self.agent is None or self.agent is not process:
            self.down.flights.clear()  # a process that is gone, or that does not listen yet
            self.send(self.up, "refused")
            return True
        self._world.note(f"{self.down.source}>{self.down.target} {data!r}")
        self.incoming.put_nowait(decode_order(data))
        return True

    def _at_leader(self, kind: str, data: bytes) -> bool:
        node = self._world.whole[self.up.target]
        if not node.powered:
            return False
        if node.process is not self.leader:
            self.over = True
            self._close_session()
            return True
        if node.frozen:
            return False
        if kind == "data":
            self._world.note(f"{self.up.source}>{self.up.target} {data!r}")
            self.call.arrive(decode_report(data))
            return True
        code = grpc.StatusCode.UNAVAILABLE
        if kind == "end":
            code = grpc.StatusCode[data.partition(b" ")[0].decode()]
        self.call.end(None if code is grpc.StatusCode.OK else _error(code, data.decode() or kind))
        self.over = True
        return True

    def _watch(self) -> None:
        """The leader's end pings; a cut either way, or a process that stands still, is silence."""
        cut, now_s = self._streams.cut, self._world.now_s
        there = self._world.whole[self.down.target]
        ways = {(self.down.source, self.down.target), (self.up.source, self.up.target)}
        if not ways & cut and there.powered and not there.frozen and self.session is not None:
            self._answered_s = now_s
        leader = self._world.whole[self.down.source]
        if self.given_up or leader.process is not self.leader or leader.frozen:
            return
        if now_s - self._answered_s > self._patience_s:
            self.call.end(_error(grpc.StatusCode.UNAVAILABLE, "keepalive timed out"))
            self.give_up()

    def give_up(self) -> None:
        """The leader's end is closed; its kernel still sends what it holds, and the end of it."""
        if not self.given_up:
            self.given_up = True
            self.send(self.down, "reset")

    def accepted(self, term: int) -> None:
        """The agent has taken the session on."""
        target = self._world.whole[self.down.target]
        self._world.promises.accepts(target, self.leader.name, term)

    def leader_gone(self, *, power: bool) -> None:
        """The leader's process was killed, or its machine has lost its power."""
        if power:
            self.down.flights.clear()
            self._forget_later()
        else:
            self.give_up()

    def agent_gone(self, *, power: bool) -> None:
        """The agent's process was killed (its kernel says so), or its machine lost its power."""
        self.session = None
        self.up.flights.clear()
        if not power:
            self.send(self.up, "refused")

    def _forget_later(self) -> None:
        """A half-open session: the agent learns it when its own pings stay unanswered."""
        self.given_up = True
        self.down.last_at_s = self._world.now_s + self._world.rng.uniform(5.0, 20.0)
        self.send(self.down, "reset")

    def _close_session(self) -> None:
        self.over = True
        if self.session is not None and self.agent is not None \
                and self.agent is self._world.whole[self.down.target].process:
            self.session.cancel()


class SimCall:
    """What `Links` needs of a gRPC stream's call."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._reports: asyncio.Queue[object] = asyncio.Queue()
        self._over = False

    async def write(self, order: Order) -> None:
        """Hand an order to the kernel."""
        if self._over:
            raise asyncio.InvalidStateError("the call is over")
        self._stream.send(self._stream.down, "data", encode(order))
        await asyncio.sleep(0)

    def arrive(self, report: Report) -> None:
        """From the world: a report is here."""
        self._reports.put_nowait(report)

    def end(self, error: grpc.aio.AioRpcError | None) -> None:
        """From the world: the stream has ended."""
        if not self._over:
            self._over = True
            self._reports.put_nowait(error or _END)

    def cancel(self) -> None:
        """This end wants no more."""
        if not self._over:
            self._over = True
            self._stream.give_up()
            self._reports.put_nowait(asyncio.CancelledError())

    def __aiter__(self) -> SimCall:
        return self

    async def __anext__(self) -> Report:
        item = await self._reports.get()
        if item is _END:
            raise StopAsyncIteration
        if isinstance(item, BaseException):
            raise item
        return item  # type: ignore[return-value]  # what `arrive` took


class SimChannel:
    """What `Links` needs of a gRPC channel."""

    def __init__(self, streams: Streams, leader: Process, target: str) -> None:
        self._streams, self._leader, self._target = streams, leader, target
        self._calls: list[SimCall] = []

    def stream_stream(self, _path: str, **_codecs: object) -> Callable[..., SimCall]:
        def begin(**_options: object) -> SimCall:
            call = self._streams.open(self._leader, self._target)
            self._calls = [call]
            return call

        return begin

    async def close(self) -> None:
        for call in self._calls:
            call.cancel()


class SimCredentials(Credentials):
    """Dials over the simulated network, as the process that it belongs to."""

    def __init__(self, streams: Streams, leader: Process) -> None:
        super().__init__(b"", b"", b"")
        self._dialled, self._leader = streams, leader

    def channel(self, address: str, node: str) -> Any:
        """To the agent of `node`."""
        return SimChannel(self._dialled, self._leader, node)


class Streams:
    """All streams of the world."""

    def __init__(self, world: WholeWorld) -> None:
        self.world = world
        self.cut: set[tuple[str, str]] = set()  # (from, to); the log's ways are cut by themselves
        self._all: list[Stream] = []

    def open(self, leader: Process, target: str) -> SimCall:
        """A new stream from a leader's process."""
        stream = Stream(self, leader, target)
        self._all.append(stream)
        stream.send(stream.down, "open")
        return stream.call

    def step(self) -> None:
        """Move all of them on."""
        for stream in self._all:
            stream.step()
        self._all = [stream for stream in self._all if not stream.is_gone]

    def gone(self, process: Process, *, power: bool) -> None:
        """A process is no more."""
        for stream in self._all:
            if stream.leader is process:
                stream.leader_gone(power=power)
            if stream.agent is process:
                stream.agent_gone(power=power)


async def _serve(stream: Stream, agent: AgentServer) -> None:
    """As gRPC's server drives the handler of a stream."""
    context = Context(stream.leader.name)

    async def orders() -> AsyncIterator[Order]:
        while True:
            order: Any = await stream.incoming.get()
            if isinstance(order, Hello):
                SESSION_TERM.set(order.term)
            yield order

    of_grpc: Any = context  # as much of it as a session uses
    reports: Any = agent._session(orders(), of_grpc)
    code = "OK"
    try:
        async for report in reports:
            if isinstance(report, Inventory):
                stream.accepted(SESSION_TERM.get())
            stream.send(stream.up, "data", encode(report))
    except Aborted:
        code = f"{context.code.name} {context.why}"
    except asyncio.CancelledError:
        code = "CANCELLED"
    finally:
        with contextlib.suppress(Aborted):
            await reports.aclose()
        stream.send(stream.up, "end", code.encode())

