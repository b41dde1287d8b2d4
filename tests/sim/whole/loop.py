"""An asyncio loop of one simulated process: virtual time, no selector, no thread, no chance.

Each process has a loop of its own, which the world pumps: one that is paused is not pumped, and
one that is killed never again, so that nothing of it runs on, not even a `finally`.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
from asyncio import base_events, events
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")

DEAF_S = 5.0

MAX_ROUNDS = 5_000
"""Rounds of one pump, in which no time passes: what needs more never waits for anything."""


class SimTask(asyncio.Task[T]):
    """Hashed by its number: a TaskGroup keeps a set, whose order must not follow addresses."""

    def __init__(self, coro: Coroutine[Any, Any, T] | Generator[Any, None, T],
                 loop: SimLoop, context: contextvars.Context | None) -> None:
        loop.created += 1
        self._number = loop.created
        super().__init__(coro, loop=loop, context=context)

    def __hash__(self) -> int:
        return self._number


class _NoSelector:
    """In the place of the selector: nothing arrives from outside, and nobody waits."""

    def select(self, _timeout_s: float | None) -> list[object]:
        return []


class Stuck(AssertionError):
    """Callbacks follow callbacks without end at one moment."""


class SimLoop(base_events.BaseEventLoop):
    """`now` is the world's clock in seconds."""

    def __init__(self, now: Callable[[], float], failed: Callable[[str], None]) -> None:
        super().__init__()
        self._now = now
        self._selector = _NoSelector()
        self._clock_resolution = 1e-9
        self._alive: dict[SimTask[Any], None] = {}
        self._cancelled_at_s: dict[SimTask[Any], float] = {}
        self.created = 0
        self._failed = failed
        self.set_task_factory(self._make_task)  # type: ignore[arg-type]  # the protocol is looser
        self.set_exception_handler(self._complain)

    def time(self) -> float:
        """Seconds since the world began."""
        return self._now()

    def pump(self) -> None:
        """Run what is due now, until nothing is."""
        hooks = sys.get_asyncgen_hooks()
        base: Any = self  # its private names are not in the stubs
        sys.set_asyncgen_hooks(base._asyncgen_firstiter_hook, base._asyncgen_finalizer_hook)
        events._set_running_loop(self)
        try:
            for _ in range(MAX_ROUNDS):
                if not self._is_due():
                    return
                base._run_once()
            raise Stuck(f"{MAX_ROUNDS} rounds at {self._now():.2f} s")
        finally:
            events._set_running_loop(None)
            sys.set_asyncgen_hooks(*hooks)

    def deaf(self) -> str:
        """A task that goes on though it was cancelled: whoever waits for its end waits for ever."""
        now_s = self._now()
        self._cancelled_at_s = {
            task: self._cancelled_at_s.get(task, now_s) for task in self._alive
            if task.cancelling()
        }
        for task, since_s in self._cancelled_at_s.items():
            if now_s - since_s > DEAF_S:
                name = getattr(task.get_coro(), "__qualname__", "a task")
                return f"{name} was cancelled {DEAF_S:g} s ago and goes on"
        return ""

    def end(self) -> None:
        """After the world's end: cancel what still waits, so that nothing is left to collect."""
        self._failed = lambda _what: None
        for _ in range(20):
            if not self._alive:
                break
            for task in tuple(self._alive):
                task.cancel()
            self.pump()
        for task in tuple(self._alive):
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's own switch
        self.close()

    def _is_due(self) -> bool:
        ready: object = self._ready  # type: ignore[attr-defined]  # of BaseEventLoop
        scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]  # of BaseEventLoop
        return bool(ready) or (bool(scheduled) and scheduled[0].when() <= self._now())

    def _make_task(
        self, _loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, T],
        context: contextvars.Context | None = None,
    ) -> SimTask[T]:
        task = SimTask(coro, self, context)
        self._alive[task] = None
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        assert isinstance(task, SimTask)
        self._alive.pop(task, None)

    def _complain(self, _loop: object, context: dict[str, Any]) -> None:
        self._failed(f"{context.get('message')}: {context.get('exception')!r}")

    # What a selector would have been for.

    def _process_events(self, _events: list[object]) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps in a select."""
