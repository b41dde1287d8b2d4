"""How long a deploy may take, fixed when it starts (design: Everything is a fact in the log)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from reconciler.fsm.records import Change
from reconciler.language.spec import ServiceSpec
from reconciler.plan.order import longest_ms


def budget_ms(
    changes: Iterable[Change], specs: Mapping[str, ServiceSpec], pull_budget_ms: int
) -> int:
    """The time for pulls, plus the longest dependency chain's health deadlines, plus the settle.

    `specs` are by spec hash. A service whose containers all stay waits for no health, and one
    that is new does not settle.
    """
    starting = {
        change.service: change
        for change in changes
        if change.action in ("create", "update") and any(not s.keep for s in change.slots)
    }
    spec_of = {name: specs[change.spec_hash] for name, change in starting.items()}
    chain_ms = longest_ms(
        {name: spec.depends_on for name, spec in spec_of.items()},
        lambda name: spec_of[name].health.deadline_ms,
    )
    settle_ms = max(
        (spec_of[name].bake_ms for name, change in starting.items()
         if change.action == "update"),
        default=0,
    )
    return pull_budget_ms + chain_ms + settle_ms
