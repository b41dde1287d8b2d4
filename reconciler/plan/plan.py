"""The whole plan: what changes, where it runs, what people should know. Nothing is done yet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from reconciler.errors import Conflict
from reconciler.fsm.records import ENDED, Allocation, Change, Slot
from reconciler.fsm.state import State
from reconciler.plan.budget import budget_ms
from reconciler.plan.diff import MANUAL, ServiceDiff, Wish, diff
from reconciler.plan.explain import PlanView, strategy, view
from reconciler.plan.place import (
    MAX_SHORTAGES,
    Demand,
    Shortage,
    images,
    place,
    reserved,
    standing,
)
from reconciler.plan.references import strained

MAX_WARNINGS = 50
"""Warnings a plan shows; the rest is counted."""


class DoesNotFit(Conflict):
    """The cluster has no room: 409. `shortages` say what is short for each service, and where."""

    def __init__(self, shortages: tuple[Shortage, ...], hint: str) -> None:
        more = " (and perhaps more)" if len(shortages) == MAX_SHORTAGES else ""
        super().__init__("; ".join(s.text for s in shortages) + more, hint=hint)
        self.shortages = shortages


@dataclass(frozen=True, slots=True)
class Plan:
    """What a deploy would do: `diffs` for people, `changes` for the log."""

    diffs: tuple[ServiceDiff, ...]
    changes: tuple[Change, ...]
    warnings: tuple[str, ...]
    view: PlanView

    def budget_ms(self, pull_budget_ms: int) -> int:
        """The deploy's deadline, from its start."""
        specs = {one.spec_hash: one.spec for one in self.diffs if one.spec is not None}
        return budget_ms(self.changes, specs, pull_budget_ms)


def make_plan(
    wishes: Iterable[Wish], state: State, *, owner: str = MANUAL, prune: bool = False,
    warnings: tuple[str, ...] = (),
) -> Plan:
    """The plan that brings about `wishes` in `state`. The same input gives the same plan.

    Raises OwnedElsewhere, RouteTaken, DoesNotFit (all 409). References must have been checked;
    `warnings` come first among the plan's own.
    """
    diffs = diff(wishes, state, owner=owner, prune=prune)
    live = live_allocations(state)
    slots = _slots(diffs, live, state)
    gone = {one.service for one in diffs if one.action == "remove"}
    specs = [one.spec for one in diffs if one.spec is not None]
    said = _bounded((
        *warnings,
        *(warning for one in diffs for warning in one.warnings),
        *strained(specs, state, gone),
    ))
    changes = tuple(
        _change(one, slots.get(one.service, ())) for one in diffs if one.records
    )
    return Plan(diffs, changes, said, view(diffs, slots, live, said))


def live_allocations(state: State) -> dict[str, tuple[Allocation, ...]]:
    """What each service runs now, by slot: committed and not ended. One pass over the state."""
    found: dict[str, list[Allocation]] = {}
    for alloc in state.allocations.values():
        if alloc.live and alloc.status not in ENDED:
            found.setdefault(alloc.service, []).append(alloc)
    return {name: tuple(sorted(allocs, key=lambda a: (a.slot, a.id)))
            for name, allocs in found.items()}


def _slots(
    diffs: tuple[ServiceDiff, ...], live: dict[str, tuple[Allocation, ...]], state: State
) -> dict[str, tuple[Slot, ...]]:
    demands = [
        Demand(
            service=one.service, cpu_milli=one.spec.cpu_milli,
            memory_bytes=one.spec.memory_bytes, replicas=one.spec.replicas, digest=one.digest,
            standing=standing(live.get(one.service, ()), state.nodes) if one.keeps else (),
        )
        for one in diffs
        if one.spec is not None and one.action in ("create", "update")
    ]
    if not demands:
        return {}
    nodes = [state.nodes[name] for name in sorted(state.nodes)]
    placed = place(demands, nodes, reserved(state), images(state))
    if placed.shortages:
        raise DoesNotFit(placed.shortages, _room_hint(diffs, placed.shortages, state))
    return placed.slots


def _room_hint(
    diffs: tuple[ServiceDiff, ...], shortages: tuple[Shortage, ...], state: State
) -> str:
    """What would make room; that old and new stand side by side is the usual surprise."""
    short = {shortage.service for shortage in shortages}
    hint = "ask for fewer replicas, less cpu or memory, remove a service, or add a node"
    if any(one.service in short and one.action == "update" for one in diffs):
        hint = (
            "the new containers must fit beside the old ones (surge); replacing them in batches "
            f"(rolling) is not built yet. {hint}; mill scale NAME=N with a smaller N frees room"
        )
    stopping = sum(alloc.status == "stopping" for alloc in state.allocations.values())
    if stopping:
        hint = f"{stopping} allocations are just stopping: try again in a moment. Or {hint}"
    return hint


def _change(one: ServiceDiff, slots: tuple[Slot, ...]) -> Change:
    return Change(
        service=one.service, action=one.action, spec_hash=one.spec_hash, digest=one.digest,
        from_revision=one.from_revision, to_revision=one.to_revision,
        generation=one.generation, secrets=one.secrets, strategy=strategy(one), slots=slots,
        owner=one.owner, diverged=one.diverged,
    )


def _bounded(warnings: tuple[str, ...]) -> tuple[str, ...]:
    if len(warnings) <= MAX_WARNINGS:
        return warnings
    return (*warnings[:MAX_WARNINGS], f"and {len(warnings) - MAX_WARNINGS} more warnings")
