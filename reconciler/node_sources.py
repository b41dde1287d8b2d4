"""A source's commit, brought about as one deploy with prune, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass

from reconciler.errors import Conflict, MillError, Unavailable
from reconciler.executor.front import Front
from reconciler.executor.ledger import Ledger
from reconciler.executor.requests import DeployRequest
from reconciler.fsm.records import Origin, Source
from reconciler.git.decide import (
    Ask,
    Blocked,
    Deployed,
    Emptied,
    Invalid,
    Result,
    Retryable,
    RolledBack,
)
from reconciler.git.findings import Commit
from reconciler.language.problems import InvalidManifest


@dataclass(frozen=True)
class Bringer:
    """What the sources' loop calls for each commit."""

    ledger: Ledger
    front: Front

    async def __call__(self, source: Source, commit: Commit, ask: Ask) -> Result:
        """Apply the commit. Cancelled, its deploy goes on for the next leader to find."""
        request = DeployRequest(
            files=commit.files, variables=dict(source.variables), prune=True, owner=source.name,
            origin=Origin(kind="git", source=source.name, commit=commit.sha,
                          author=commit.author, subject=commit.subject),
        )
        try:
            if not ask.allow_empty:
                emptied = await self._emptied(source, request)
                if emptied:
                    return Emptied(emptied)
            deploy = await self.front.start(request)
        except InvalidManifest as error:
            return Invalid("\n".join(
                f"{p.file}:{p.line}:{p.column}: {p.message}" for p in error.problems))
        except Conflict as error:
            return Blocked(error.what)
        except Unavailable as error:
            return Retryable(error.what)
        except MillError as error:
            return Blocked(error.what) if error.status == 409 else Invalid(error.what)
        return await self._ended(deploy)

    async def _emptied(self, source: Source, request: DeployRequest) -> str:
        """Why this commit would leave nothing of what the source owns; "" where it would not."""
        owned = {s.name for s in self.ledger.state.services.values() if s.owner == source.name}
        if not owned:
            return ""
        view = await self.front.plan(request)
        removed = {s.name for s in view.services if s.action == "remove"}
        if owned <= removed:
            return f"it removes {', '.join(sorted(owned))}, all that the source owns"
        return ""

    async def _ended(self, deploy_id: str) -> Result:
        state = await self.ledger.until(
            lambda s: deploy_id not in s.deploys or s.deploys[deploy_id].finished)
        deploy = state.deploys.get(deploy_id)
        if deploy is None or deploy.outcome == "deployed":
            return Deployed(deploy_id)
        reason = deploy.failure.reason if deploy.failure else deploy.outcome
        if _from_outside(reason):
            return Retryable(reason)
        return RolledBack(deploy_id, reason)


def _from_outside(reason: str) -> bool:
    """A node or a registry failed it, not the version: it is tried again by itself."""
    return reason.startswith("cannot pull ") or " could not run " in reason
