"""One actor an allocation: it brings about what was last ordered and reports what is.

Orders are kept on the node's disk (secrets in them are sealed), so that an agent that starts
again takes its containers up without a leader and without restarting one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec
import structlog

from reconciler.errors import MillError
from reconciler.executor.agent.orders import AllocReport, Report, Start, encode
from reconciler.executor.agent.probe import Judge, Target, Verdict, look, waits_ms

log = structlog.get_logger("mill.agent")

TAIL_LINES = 20
"""The lines that a failed deploy shows (contracts: the deploy stream)."""
STOP_RETRY_S = 2.0
ACTOR_RETRY_S = 0.5


class StartFailed(MillError):
    """A container could not be started; `node_fault`: another node may do better."""

    def __init__(self, what: str, *, node_fault: bool) -> None:
        super().__init__(what)
        self.node_fault = node_fault


@dataclass(frozen=True)
class Exit:
    """How a container ended."""

    code: int
    oom: bool


@dataclass(frozen=True)
class Found:
    """A container that is here already."""

    alloc: str
    running: bool


class Runtime(Protocol):
    """Containers, networks and logs of this node, by allocation."""

    async def start(self, order: Start) -> None:
        """Pull if need be, then run it: an incarnation after the first replaces the one before
        it. Raises StartFailed."""
        ...

    async def wait(self, alloc: str) -> Exit:
        """Until the container has ended."""
        ...

    async def stop(self, alloc: str, grace_s: float) -> None:
        """TERM, KILL after the grace, and nothing of it left; idempotent."""
        ...

    async def found(self) -> list[Found]:
        """All containers of this node."""
        ...

    def target(self, order: Start) -> Target:
        """Where it is probed."""
        ...

    async def tail(self, alloc: str, lines: int) -> tuple[str, ...]:
        """The last lines it wrote."""
        ...


@dataclass
class Actor:
    """One allocation's life. `order` is what is wanted; None: that it be gone."""

    alloc: str
    order: Start | None
    runtime: Runtime
    tell: Callable[[AllocReport], None]
    now: Callable[[], float]
    report: AllocReport
    running: int = -1
    ended: int = -1
    started_at: float = 0.0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def want(self, order: Start | None) -> None:
        """Take a newer order; the same one again only asks for a report."""
        known = self.order
        if order is not None and known is not None and order.restarts <= known.restarts:
            self.tell(self.report)
            return
        self.order = order
        self._changed.set()

    async def run(self, grace_s: Callable[[], float]) -> None:
        """Until the allocation is gone."""
        while True:
            self._changed.clear()
            order = self.order
            if order is None:
                await self._stop(grace_s())
                if self.order is None:
                    return
                self.running = self.ended = -1  # wanted again while it was being stopped
                continue
            if self.running < order.restarts and self.ended < order.restarts:
                await self._start(order)
            elif self.running >= order.restarts:
                await self._live(order)
            else:
                await self._changed.wait()

    def _say(self, report: AllocReport) -> None:
        self.report = report
        self.tell(report)

    async def _start(self, order: Start) -> None:
        self._say(AllocReport(alloc=self.alloc, phase="starting", restarts=order.restarts))
        try:
            await self.runtime.start(order)
        except StartFailed as failed:
            log.warning("start_failed", alloc=self.alloc, reason=failed.what)
            self._not_started(order, failed.what, node_fault=failed.node_fault)
            return
        except Exception as error:
            log.exception("start_broke", alloc=self.alloc)
            self._not_started(order, str(error), node_fault=True)
            return
        self.running = order.restarts
        self.started_at = self.now()
        self._say(AllocReport(alloc=self.alloc, phase="running", restarts=order.restarts))

    def _not_started(self, order: Start, why: str, *, node_fault: bool) -> None:
        self.ended = order.restarts
        self._say(AllocReport(alloc=self.alloc, phase="error", restarts=order.restarts,
                              error=why, node_fault=node_fault))

    async def _live(self, order: Start) -> None:
        """Probe until it ends or another order comes."""
        waiting = asyncio.create_task(self.runtime.wait(self.alloc))
        probing = asyncio.create_task(self._probe(order))
        changed = asyncio.create_task(self._changed.wait())
        try:
            await asyncio.wait({waiting, changed}, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                await self._exited(order, waiting.result())
        finally:
            for task in (waiting, probing, changed):
                task.cancel()
            await asyncio.gather(waiting, probing, changed, return_exceptions=True)

    async def _exited(self, order: Start, end: Exit) -> None:
        self.running, self.ended = -1, order.restarts
        log.info("alloc_exited", alloc=self.alloc, code=end.code, oom=end.oom)
        self._say(AllocReport(
            alloc=self.alloc, phase="exited", restarts=order.restarts, exit_code=end.code,
            oom=end.oom, tail=await self._tail(),
        ))

    async def _tail(self) -> tuple[str, ...]:
        """The last lines; none where they cannot be read, for the exit matters more."""
        try:
            return await self.runtime.tail(self.alloc, TAIL_LINES)
        except Exception:
            log.exception("tail_failed", alloc=self.alloc)
            return ()

    async def _probe(self, order: Start) -> None:
        probe, target = order.probe, self.runtime.target(order)
        judge = Judge(probe)
        detail = ""
        while True:
            since_ms = round((self.now() - self.started_at) * 1000)
            eager = judge.healthy is None or since_ms < probe.eager_ms
            await asyncio.sleep(waits_ms(probe, since_ms, eager) / 1000)
            verdict = await self._look(order, target)
            since_ms = round((self.now() - self.started_at) * 1000)
            if judge.take(verdict, since_ms) or verdict.detail != detail:
                detail = verdict.detail
                await self._judged(order, judge, verdict, since_ms)

    async def _look(self, order: Start, target: Target) -> Verdict:
        """A probe that breaks is one that did not pass: nobody would start it again."""
        try:
            return await look(order.probe, target)
        except Exception as error:
            log.exception("probe_failed", alloc=self.alloc)
            return Verdict(False, f"the probe failed: {error}")

    async def _judged(
        self, order: Start, judge: Judge, verdict: Verdict, since_ms: int
    ) -> None:
        well = judge.healthy is True
        tail = () if well else await self._tail()
        self._say(AllocReport(
            alloc=self.alloc, phase="running", restarts=order.restarts, healthy=judge.healthy,
            detail=verdict.detail, since_start_s=since_ms / 1000, tail=tail,
        ))

    async def _stop(self, grace_s: float) -> None:
        while True:
            try:
                await self.runtime.stop(self.alloc, grace_s)
                break
            except Exception:
                log.exception("stop_failed", alloc=self.alloc)
                await asyncio.sleep(STOP_RETRY_S)
        self._say(AllocReport(alloc=self.alloc, phase="absent"))


class Supervisor:
    """All allocations of this node."""

    def __init__(
        self, runtime: Runtime, folder: Path, tell: Callable[[Report], None],
        now: Callable[[], float],
    ) -> None:
        self._runtime = runtime
        self._folder = folder
        self._tell = tell
        self._now = now
        self._actors: dict[str, Actor] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._graces: dict[str, float] = {}
        self._group: asyncio.TaskGroup | None = None

    def inventory(self) -> tuple[AllocReport, ...]:
        """What every allocation here is, by id."""
        return tuple(self._actors[a].report for a in sorted(self._actors))

    def tasks(self) -> list[asyncio.Task[None]]:
        """The actors' tasks; to cancel them ends no container."""
        return list(self._tasks.values())

    async def recover(self, group: asyncio.TaskGroup) -> None:
        """Take up what was here before this agent; call once, before any order."""
        self._group = group
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        orders = {path.name: _read(path) for path in self._folder.iterdir()}
        found = {f.alloc: f for f in await self._runtime.found()}
        for alloc in sorted(orders.keys() - found.keys()):
            # Ordered, but not here any more (a reboot, a power cut): the leader, which does not
            # find it in the inventory, orders it again.
            (self._folder / alloc).unlink(missing_ok=True)
        for alloc in sorted(found):
            self._adopt(alloc, orders.get(alloc), found[alloc])

    def _adopt(self, alloc: str, order: Start | None, found: Found) -> None:
        actor = self._actor(alloc, order)
        if order is None:
            # A container whose order is lost cannot be probed or started again: it is stopped,
            # and a leader that still wants it orders it anew.
            actor.order = None
            self._graces[alloc] = 10.0
        elif found.running:
            actor.running = order.restarts
            actor.started_at = self._now()
            actor.report = AllocReport(alloc=alloc, phase="running", restarts=order.restarts)
        else:
            actor.ended = order.restarts
            actor.report = AllocReport(alloc=alloc, phase="exited", restarts=order.restarts,
                                       exit_code=None)
        self._launch(actor)

    def _actor(self, alloc: str, order: Start | None) -> Actor:
        first = AllocReport(alloc=alloc, phase="starting")
        actor = Actor(alloc, order, self._runtime, self._tell, self._now, first)
        self._actors[alloc] = actor
        return actor

    def _launch(self, actor: Actor) -> None:
        assert self._group is not None, "recover comes first"
        self._tasks[actor.alloc] = self._group.create_task(self._life(actor))

    async def _life(self, actor: Actor) -> None:
        alloc = actor.alloc
        while True:
            try:
                await actor.run(lambda: self._graces.get(alloc, 10.0))
                break
            except Exception:
                # What one container does to its actor must not end the node and all others.
                log.exception("actor_failed", alloc=alloc)
                await asyncio.sleep(ACTOR_RETRY_S)
        (self._folder / alloc).unlink(missing_ok=True)
        self._actors.pop(alloc, None)
        self._tasks.pop(alloc, None)
        self._graces.pop(alloc, None)

    def start(self, order: Start) -> None:
        """Have it run, in the ordered incarnation."""
        actor = self._actors.get(order.alloc)
        known = actor.order if actor is not None else None
        try:
            if known is None or order.restarts > known.restarts:
                _write(self._folder, order)
        except OSError as error:
            log.warning("order_unwritten", alloc=order.alloc, reason=str(error))
            self._tell(AllocReport(
                alloc=order.alloc, phase="error", restarts=order.restarts, node_fault=True,
                error=f"the order cannot be kept on disk: {error}"))
            return
        if actor is not None:
            actor.want(order)
        else:
            self._launch(self._actor(order.alloc, order))

    def stop(self, alloc: str, *, kill: bool) -> None:
        """Have it gone; what is gone is said to be."""
        actor = self._actors.get(alloc)
        if actor is None:
            self._tell(AllocReport(alloc=alloc, phase="absent"))
            return
        if actor.order is not None:
            self._graces[alloc] = 0.0 if kill else actor.order.stop_timeout_ms / 1000
        actor.want(None)


def _write(folder: Path, order: Start) -> None:
    """Beside, then renamed: a half-written order is never read. Not synced: what a power cut
    takes, the leader orders again."""
    beside = folder / f".{order.alloc}"
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(encode(order))
    beside.rename(folder / order.alloc)


def _read(path: Path) -> Start | None:
    if path.name.startswith("."):
        path.unlink(missing_ok=True)
        return None
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=Start)
    except msgspec.DecodeError as error:
        log.warning("order_unreadable", alloc=path.name, reason=str(error))
        return None
