"""What a person, a token or a source may ask of the executor."""

from __future__ import annotations

import msgspec

from reconciler.fsm.records import Origin
from reconciler.language.spec import Strategy

DEFAULT_PULL_BUDGET_MS = 300_000
"""The time for pulls where a deploy names none (contracts: `--timeout 5m`)."""


class DeployRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A manifest to bring about. `strategy` "" leaves each service's own.

    `owner` is "manual" or the source; with `prune` the owner's services that the manifest does
    not name are removed. `key` is the caller's Idempotency-Key.
    """

    files: dict[str, bytes]
    variables: dict[str, str] = {}
    prune: bool = False
    strategy: Strategy | None = None
    pull_budget_ms: int = DEFAULT_PULL_BUDGET_MS
    owner: str = "manual"
    origin: Origin = Origin()
    key: str = ""
