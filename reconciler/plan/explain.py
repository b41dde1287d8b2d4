"""A plan as people and programs read it: the JSON of `/v1/plan` (contracts: A plan)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from reconciler.fsm.records import Action, Allocation, FieldChange, Slot
from reconciler.plan.diff import ServiceDiff
from reconciler.plan.fields import pinned


class PlacementView(msgspec.Struct, frozen=True):
    """Where one replica runs; `kept`: it runs there already and is not touched."""

    node: str
    kept: bool


class ServicePlan(msgspec.Struct, frozen=True):
    """What a deploy does to one service, and why in that way. `image` carries its digest."""

    name: str
    action: Action
    changes: tuple[FieldChange, ...]
    strategy: str
    reason: str
    image: str
    placements: tuple[PlacementView, ...]


class PlanView(msgspec.Struct, frozen=True):
    """The whole plan, services by name with removals last."""

    services: tuple[ServicePlan, ...]
    warnings: tuple[str, ...] = ()


def view(
    diffs: Iterable[ServiceDiff],
    slots: Mapping[str, tuple[Slot, ...]],
    live: Mapping[str, tuple[Allocation, ...]],
    warnings: tuple[str, ...],
) -> PlanView:
    """The plan of `diffs`, placed in `slots`; `live` is what runs now, by service."""
    return PlanView(
        tuple(
            _service(one, slots.get(one.service, ()), live.get(one.service, ())) for one in diffs
        ),
        warnings,
    )


def strategy(one: ServiceDiff) -> str:
    """How the change is carried out; empty where nothing is started."""
    return "surge" if one.action in ("create", "update") else ""


def _service(
    one: ServiceDiff, slots: tuple[Slot, ...], live: tuple[Allocation, ...]
) -> ServicePlan:
    spec = one.spec or one.old
    if one.action == "unchanged":
        placements = tuple(PlacementView(alloc.node, kept=True) for alloc in live)
    else:
        placements = tuple(PlacementView(slot.node, kept=bool(slot.keep)) for slot in slots)
    return ServicePlan(
        name=one.service, action=one.action, changes=one.changes, strategy=strategy(one),
        reason=_reason(one, slots, live), image=pinned(spec.image, one.digest) if spec else "",
        placements=placements,
    )


def _reason(
    one: ServiceDiff, slots: tuple[Slot, ...], live: tuple[Allocation, ...]
) -> str:
    if one.action == "create":
        return "nothing runs yet that could be replaced"
    if one.action == "remove":
        return "the manifest does not name it any more"
    if one.action == "unchanged":
        return "the spec and the image are those that run"
    new = sum(not slot.keep for slot in slots)
    kept = len(slots) - new
    if not one.keeps:
        return "there is room for the new containers beside the old"
    if new:
        return f"{kept} running containers stay, {new} more fit beside them"
    stopped = len(live) - kept
    return "no container is touched" if stopped <= 0 else f"{stopped} containers are stopped"
