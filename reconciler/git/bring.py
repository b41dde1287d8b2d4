"""A commit brought about: one deploy is started, and what became of it is read from the log."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from reconciler.errors import Conflict, Malformed, MillError, NotFound, Unprocessable
from reconciler.fsm.records import Deploy, Source
from reconciler.fsm.state import State
from reconciler.git.decide import (
    Ask,
    Blocked,
    Deployed,
    Emptied,
    Invalid,
    Result,
    Retryable,
    RolledBack,
    owned_services,
)
from reconciler.git.findings import Commit
from reconciler.language.problems import InvalidManifest

Start = Callable[[Source, Commit], Awaitable[str]]
"""Admits the commit as one deploy, with prune for the services of its source; the deploy's id.

What it raises decides: InvalidManifest and other 4xx refuse the commit, Conflict makes it wait,
anything else is tried again.
"""

CountServices = Callable[[Mapping[str, bytes], Mapping[str, str]], Awaitable[int | None]]
"""How many services the files name, with these variables; None where they have mistakes."""


class Watched(Protocol):
    """The log, as far as a deploy's end is seen in it."""

    @property
    def state(self) -> State:
        """The newest applied state."""
        ...

    async def until(self, holds: Callable[[State], bool]) -> State:
        """Wait for a state that `holds`."""
        ...


class Bring:
    """Called by the loop over sources. Cancelled, it leaves a started deploy to run on."""

    def __init__(self, ledger: Watched, start: Start, count_services: CountServices) -> None:
        self._ledger = ledger
        self._start = start
        self._count_services = count_services

    async def __call__(self, source: Source, commit: Commit, ask: Ask) -> Result:
        """Start the deploy and wait for its end, which its own deadlines bound."""
        try:
            if not ask.allow_empty and owned_services(self._ledger.state, source.name) \
                    and await self._count_services(commit.files, dict(source.variables)) == 0:
                return Emptied("its manifests name no service")
            deploy = await self._start(source, commit)
        except MillError as error:
            return as_result(error)
        state = await self._ledger.until(
            lambda s: deploy not in s.deploys or s.deploys[deploy].finished)
        return outcome(state.deploys.get(deploy), deploy)


def outcome(deploy: Deploy | None, name: str) -> Result:
    """What the end of a deploy means for the commit."""
    if deploy is None:
        return Retryable(f"{name} is no longer in the log")
    if deploy.outcome == "deployed":
        return Deployed(name)
    reason = deploy.failure.reason if deploy.failure else ""
    if deploy.failure and deploy.failure.outside:
        return Retryable(reason)
    return RolledBack(name, reason or deploy.outcome.replace("_", " "))


def as_result(error: MillError) -> Result:
    """What a refusal that was raised means: a conflict may pass, a bad manifest will not."""
    told = f"{error}; {error.hint}" if error.hint else str(error)
    if isinstance(error, InvalidManifest):
        lines = [f"{p.at}: {p.message}" for p in error.problems]
        more = [f"and {error.omitted} more"] if error.omitted else []
        return Invalid("\n".join(lines + more))
    if isinstance(error, Conflict) or error.status == Conflict.status:
        return Blocked(told)
    if isinstance(error, Unprocessable | Malformed | NotFound):
        return Invalid(told)
    return Retryable(told)
