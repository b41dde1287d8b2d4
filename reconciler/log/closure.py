"""A log that its disk has closed: why, and the tries to open it again.

Only the log part of the node is away meanwhile. The same open file is never retried: each
try opens a new engine on the folder, which verifies all of it (`reopening`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from reconciler.errors import MillError
from reconciler.log.engine import Engine
from reconciler.log.errors import DiskFailed, LogDamaged

_log = logging.getLogger(__name__)


def closes(error: BaseException) -> bool:
    """Whether `error` closes the log alone; any other is a mistake that ends the node."""
    return isinstance(error, DiskFailed | LogDamaged)


def reason_of(error: MillError, folder: str) -> str:
    """Why the log is closed, in one line that names the disk by its folder."""
    if isinstance(error, DiskFailed):
        return f"{error.reason} ({folder})"
    return f"{error} ({folder})"


class Closure:
    """From the failure until a new engine runs, or until `end`."""

    def __init__(
        self, folder: str, error: MillError, every_s: float, open_engine: Callable[[], Engine]
    ) -> None:
        self.reason = reason_of(error, folder)
        self._folder, self._every_s, self._open_engine = folder, every_s, open_engine
        self._ended = asyncio.Event()

    def end(self) -> None:
        """Try no more; the try under way is finished."""
        self._ended.set()

    async def wait(self, former: Engine | None, told: Callable[[str], None]) -> Engine | None:
        """The new engine, not started; None after `end`. `told` of each new reason."""
        if former is not None:
            await self._free(former)
        while not await self._paused():
            try:
                return await asyncio.to_thread(self._open_engine)
            except MillError as error:
                self._note(error, told)
        return None

    async def _free(self, former: Engine) -> None:
        try:
            await asyncio.to_thread(former.stop)
        except OSError as error:  # a close(2) that reports what the sync has said before
            _log.warning("log_close_failed folder=%s reason=%s", self._folder, error)

    async def _paused(self) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), self._every_s)
        return self._ended.is_set()

    def _note(self, error: MillError, told: Callable[[str], None]) -> None:
        reason = reason_of(error, self._folder)
        if reason != self.reason:
            _log.error("log_stays_closed folder=%s reason=%s", self._folder, error)
            self.reason = reason
            told(reason)
