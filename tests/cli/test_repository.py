"""What `mill dev --repo` says of a commit."""

from __future__ import annotations

from typing import Any

import pytest

from reconciler.api.types import DeployOrigin, DeployRecord, SourceAnswer
from reconciler.cli.repository import outcome

SHA = "1a2b3c4d5e" * 4


def source(status: Any, reason: str = "", head: str = SHA) -> SourceAnswer:
    return SourceAnswer(
        index=1, name="repo", url="/r", branch="HEAD", path="/", poll="1s", secret_ref="",
        services=(), hosts=(), variables={}, status=status, reason=reason, since=None, head=head,
        applied="", next_poll=None)


def deploy(ended: Any, commit: str = SHA) -> DeployRecord:
    return DeployRecord(
        id="d-9", outcome=ended, started_at="", elapsed=1.0, reason="exited with code 3",
        services=(), origin=DeployOrigin(kind="git", source="repo", commit=commit, author="",
                                         subject="", token=""))


@pytest.mark.parametrize(("seen", "deploys", "line"), [
    (source("synced"), (), "1a2b3c4 deployed"),
    (source("synced", "no .mill file"), (), "1a2b3c4 deployed (no .mill file)"),
    (source("deploying", "d-9"), (), "1a2b3c4 deploying"),
    (source("failing", "a.mill:1:2: no"), (), "1a2b3c4 failing: a.mill:1:2: no"),
    (source("failing", "x"), (deploy("rolled_back", "f" * 40),), "1a2b3c4 failing: x"),
    (source("failing", "x"), (deploy("rolled_back"),), "1a2b3c4 rolled back: exited with code 3"),
    (source("waiting", "web does not fit"), (), "1a2b3c4 waiting: web does not fit"),
    (source("held", "it removes all"), (), "1a2b3c4 held: it removes all"),
    (source("unreachable", "gone", head=""), (), "repo unreachable: gone"),
    (source("waiting", head=""), (), ""),
    (source("synced", head=""), (), ""),
])
def test_commit_is_told_with_its_outcome(
    seen: SourceAnswer, deploys: tuple[DeployRecord, ...], line: str
) -> None:
    assert outcome(seen, deploys) == line
