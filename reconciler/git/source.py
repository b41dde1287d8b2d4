"""The leader's loop over sources: look, decide, apply, record. One task follows one source.

It holds nothing that matters: cancelled anywhere (a lost leadership), the next leader's loop
finds in the log what was applied, and reads the rest from the repositories again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Protocol, assert_never

import msgspec
import structlog

from reconciler.clock import Clock
from reconciler.errors import Conflict, MillError, NotFound
from reconciler.fsm.commands import AnyCommand, ObserveSource
from reconciler.fsm.records import Deploy, Source
from reconciler.fsm.state import State
from reconciler.git.bring import as_result
from reconciler.git.decide import (
    Apply,
    Ask,
    Blocked,
    Invalid,
    Rest,
    Result,
    Retryable,
    decide,
    inherited,
    next_look_s,
    observe,
    on_result,
    running_deploy,
    settled_head,
)
from reconciler.git.findings import Commit, Found, Refused, Unchanged, Unreachable
from reconciler.git.location import Credentials, Location, parse_credentials, parse_location

log = structlog.get_logger("mill.git")


class Ledger(Protocol):
    """The log, as this loop uses it."""

    @property
    def state(self) -> State:
        """The newest applied state."""
        ...

    @property
    def is_leader(self) -> bool:
        """This node leads."""
        ...

    @property
    def clock(self) -> Clock:
        """The clock that stamps commands."""
        ...

    async def propose(self, command: AnyCommand, timeout_s: float = 10.0) -> int:
        """Commit one command."""
        ...

    async def changed(self, seen: State) -> State:
        """Wait for a state other than `seen`."""
        ...


class Look(Protocol):
    """How repositories are read: `Poller.look`."""

    async def __call__(
        self, location: Location, branch: str, path: str, last: str, *,
        credentials: Credentials | None = None, deadline_s: float = 60.0,
    ) -> Found:
        """What stands at the head of the branch."""
        ...


BringAbout = Callable[[Source, Commit, Ask], Awaitable[Result]]
"""Applies a commit as one deploy, with prune for the services of its source: `bring.Bring`.

It is cancelled when leadership or the source goes, and the deploy that it began must then go on:
whoever leads next finds it in the log. `Ask.allow_empty` false: answers `Emptied` instead of
removing all.
"""

ReadSecret = Callable[[str], str | None]
"""A secret's clear value by its name; None where there is none."""


class _Memory:
    """What one leader knows about a source beyond the log; losing it costs one more reading."""

    def __init__(self) -> None:
        self.settled = ""
        self.retry: Commit | None = None
        self.retry_at = 0.0
        self.tries = 0
        self.misses = 0
        self.wake = asyncio.Event()
        self.ask = Ask()
        self.next_look_ms = 0


class Sources:
    """Follows every source in the state. `run` on the leader alone; the rest may be called then.

    `chance` gives numbers in [0, 1) for the jitter of polls.
    """

    def __init__(
        self, ledger: Ledger, look: Look, bring: BringAbout, read_secret: ReadSecret,
        *, chance: Callable[[], float] = random.random,
    ) -> None:
        self._ledger = ledger
        self._look = look
        self._bring = bring
        self._read_secret = read_secret
        self._chance = chance
        self._followed: dict[str, _Memory] = {}

    async def run(self) -> None:
        """Until cancelled: one task for each source, started and ended as sources come and go."""
        tasks: dict[str, tuple[tuple[str, ...], asyncio.Task[None]]] = {}
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    state = self._ledger.state
                    wanted = {name: _identity(s) for name, s in state.sources.items()}
                    for name in [n for n, (i, _) in tasks.items() if wanted.get(n) != i]:
                        tasks.pop(name)[1].cancel()
                        self._followed.pop(name, None)
                    for name in sorted(wanted.keys() - tasks.keys()):
                        memory = self._followed[name] = _Memory()
                        task = group.create_task(self._follow(name, memory), name=f"git-{name}")
                        tasks[name] = (wanted[name], task)
                    await self._next_change(state)
        finally:
            self._followed.clear()

    def sync_now(self, name: str, *, allow_empty: bool = False) -> None:
        """Look now, or right after the look that runs; a quarantined commit is tried again.

        NotFound for an unknown source, Conflict for a suspended one.
        """
        source = self._ledger.state.sources.get(name)
        if source is None:
            raise NotFound(f"no source {name}", hint="list them with: mill git list")
        if source.status == "suspended":
            raise Conflict(f"source {name} is suspended", hint=f"mill git resume {name}")
        memory = self._followed.get(name)
        if memory is None:
            return  # it has just come, and is looked at at once anyway
        memory.ask = Ask(forced=True, allow_empty=allow_empty or memory.ask.allow_empty)
        memory.wake.set()

    def next_poll_ms(self, name: str) -> int | None:
        """When the source is looked at next, ms since the epoch; None where that is not known."""
        memory = self._followed.get(name)
        return memory.next_look_ms or None if memory else None

    async def _next_change(self, seen: State) -> None:
        """Wait for another state; what waits for the cluster is tried when the cluster moved."""
        state = await self._ledger.changed(seen)
        freed = bool(seen.active_deploy) and not state.active_deploy
        # States share what did not change; a false alarm costs one look.
        secrets = state.secrets is not seen.secrets
        for _, memory in sorted(self._followed.items()):
            if memory.retry is not None and (freed or secrets or state.nodes is not seen.nodes):
                memory.retry_at = 0.0
                memory.wake.set()
            elif secrets and memory.misses:
                memory.wake.set()  # the credentials may have been put right

    async def _follow(self, name: str, memory: _Memory) -> None:
        while True:
            memory.wake.clear()
            ask, memory.ask = memory.ask, Ask()
            source = self._ledger.state.sources.get(name)
            if source is not None and source.status != "suspended" and self._ledger.is_leader:
                try:
                    await self._turn(source, memory, ask)
                except MillError as error:
                    log.warning("source_not_recorded", source=name, reason=str(error))
                    memory.settled = ""
                except Exception:
                    log.exception("source_look_broke", source=name)
                    memory.settled, memory.misses = "", memory.misses + 1
            await self._pause(name, memory)

    async def _pause(self, name: str, memory: _Memory) -> None:
        source = self._ledger.state.sources.get(name)
        poll_ms = source.poll_ms if source else 10_000
        wait_s = next_look_s(poll_ms, memory.misses, self._chance())
        memory.next_look_ms = self._ledger.clock.wall_ms() + round(wait_s * 1000)
        try:
            # Not asyncio.wait_for: before Python 3.12 it drops a cancellation that comes with the
            # wake-up, and the source of a deposed leader would be followed on.
            async with asyncio.timeout(wait_s):
                await memory.wake.wait()
        except TimeoutError:
            return

    async def _turn(self, source: Source, memory: _Memory, ask: Ask) -> None:
        """One look, and what follows from it."""
        source = await self._take_over(source)
        found = await self._find(source, memory, ask)
        # The look took its time; what is decided is decided on the state of now.
        source = self._ledger.state.sources.get(source.name, source)
        step = decide(self._ledger.state, source, found, ask)
        match step:
            case Rest(command, head):
                memory.settled = head
                memory.misses = memory.misses + 1 if isinstance(found, Unreachable) else 0
                if memory.retry is not None and memory.retry.sha != head:
                    memory.retry, memory.tries = None, 0
                await self._record(command)
            case Apply(commit):
                await self._apply(source, commit, memory, ask)
            case _:
                assert_never(step)

    async def _take_over(self, source: Source) -> Source:
        """Bring to its end, in the record, what an earlier leader began."""
        state = self._ledger.state
        while isinstance(left := inherited(state, source), Deploy):
            await self._record(observe(source, "deploying", left.id, head=left.origin.commit))
            state = await self._ledger.changed(state)
            source = state.sources.get(source.name, source)
        await self._record(left)
        return self._ledger.state.sources.get(source.name, source)

    async def _find(self, source: Source, memory: _Memory, ask: Ask) -> Found:
        # What is remembered counts only as long as the log says so too: a source that was removed
        # and added again starts from nothing.
        last = memory.settled if memory.settled == source.head else settled_head(source)
        if ask.forced and last != source.applied:
            last = ""
        try:
            location = parse_location(source.url)
            credentials = self._credentials(source, location)
        except MillError as error:
            return Refused(_told(error))
        found = await self._look(location, source.branch, source.path, last,
                                 credentials=credentials)
        retry = memory.retry
        if isinstance(found, Unchanged) and retry is not None and retry.sha == found.sha \
                and asyncio.get_running_loop().time() >= memory.retry_at:
            return retry
        return found

    def _credentials(self, source: Source, location: Location) -> Credentials | None:
        if not source.secret_ref:
            return None
        value = self._read_secret(source.secret_ref)
        if value is None:
            raise NotFound(f"the source's secret {source.secret_ref} does not exist",
                           hint=f"mill secret set {source.secret_ref}")
        return parse_credentials(value, location)

    async def _apply(self, source: Source, commit: Commit, memory: _Memory, ask: Ask) -> None:
        log.info("source_applying", source=source.name, commit=commit.sha)
        watch = asyncio.create_task(self._show_deploying(source.name, commit.sha))
        try:
            result = await self._bring(source, commit, ask)
        except MillError as error:
            result = as_result(error)
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        log.info("source_applied", source=source.name, commit=commit.sha,
                 result=type(result).__name__)
        memory.settled, memory.misses = commit.sha, 0
        memory.retry = commit if isinstance(result, Invalid | Blocked | Retryable) else None
        memory.tries = memory.tries + 1 if isinstance(result, Invalid | Retryable) else 0
        # New commits are looked for as ever; only the same one is tried less and less often.
        wait_s = next_look_s(source.poll_ms, memory.tries, self._chance()) if memory.tries else 0
        memory.retry_at = asyncio.get_running_loop().time() + wait_s
        now = self._ledger.state.sources.get(source.name)
        if now is not None:
            await self._record(on_result(now, commit.sha, result))

    async def _show_deploying(self, name: str, sha: str) -> None:
        """Record `deploying` once the deploy is in the log: a refused one leaves no trace."""
        state = self._ledger.state
        while (deploy := running_deploy(state, name)) is None or deploy.origin.commit != sha:
            state = await self._ledger.changed(state)
        source = state.sources.get(name)
        if source is not None:
            await self._record(observe(source, "deploying", deploy.id, head=sha))

    async def _record(self, command: ObserveSource | None) -> None:
        if command is None:
            return
        await self._ledger.propose(command)
        log.info("source_observed", source=command.name, status=command.status,
                 reason=command.reason, head=command.head)


def _identity(source: Source) -> tuple[str, ...]:
    """What makes it the same source, so that one removed and added anew starts from nothing."""
    kept = msgspec.structs.replace(source, status="waiting", reason="", since_ms=0, head="",
                                   applied="", quarantined=())
    return tuple(map(str, msgspec.structs.astuple(kept)))


def _told(error: MillError) -> str:
    return f"{error}; {error.hint}" if error.hint else str(error)
