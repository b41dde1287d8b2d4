"""A deploy's events as the lines of its transcript, and a plan as text. Pure.

The kinds of lines and their order are the contract's; the order of the events is kept, but for a
failure: the stream tells of the rollback before it names the service that failed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from reconciler.cli.output import seconds
from reconciler.cli.problems import shown

if TYPE_CHECKING:
    from reconciler.api.client import DeployEvent, Step
    from reconciler.api.types import PlanAnswer, ServicePlan


_DIGEST = re.compile(r"(@sha256:[0-9a-f]{12})[0-9a-f]{52}")


class Transcript:
    """Events in, lines out. `actions` (service to action, of the deploy's record) must be there
    before the first `stopped` and the terminal event."""

    def __init__(self) -> None:
        self.deploy = ""
        self.actions: Mapping[str, str] = {}
        self.failing = ""
        self._replaced = False

    def lines(self, event: DeployEvent) -> list[str]:
        """What one event adds."""
        step = event.step
        match event.event:
            case "done":
                return self._done(step)
            case "failed":
                return self._failed(step)
            case _:
                return self._progress(step)

    def _progress(self, step: Step) -> list[str]:
        match step.phase:
            case "started":
                self.deploy = step.deploy
            case "pulling" if not step.image:
                return ["  pulling images..."]
            case "scheduled":
                return [f"  {shown(step.service)}: scheduled on {shown(step.node)}"]
            case "healthy" if not step.alloc:
                return [f"  {shown(step.service)}: healthy ({seconds(step.elapsed)})"]
            case "stopped":
                self._replaced = True
                if self.actions.get(step.service) != "remove":
                    return [f"  {shown(step.service)}: old instance stopped"]
            case "rolling_back":
                self.failing = step.reason
            case "warning":
                return [f"  warning: {shown(step.message)}"]
            case _:  # phases of newer versions too
                pass
        return []

    def _done(self, step: Step) -> list[str]:
        if step.changed == 0:
            return ["  no changes"]
        removed = sorted(name for name, action in self.actions.items() if action == "remove")
        return [*(f"  {shown(name)}: removed" for name in removed),
                f"  deployed ({seconds(step.elapsed)})"]

    def _failed(self, step: Step) -> list[str]:
        who = f"{shown(step.service)}: " if step.service else ""
        found = []
        if step.outcome != "cancelled":
            found.append(f"  {who}failed: {shown(step.reason)}")
            found += [f"    {shown(line)}" for line in step.logs]
        found.append("  rolling back...")
        left = "previous revisions restored" if self._replaced else "nothing changed"
        took = seconds(step.elapsed)
        match step.outcome:
            case "rollback_failed":
                found.append(f"  rollback failed ({took}): not everything new has stopped; "
                             "look with: mill ps")
            case "cancelled":
                found.append(f"  cancelled ({took}): {left}")
            case _:
                found.append(f"  rolled back ({took}): {left}")
        return found


def plan_lines(plan: PlanAnswer) -> list[str]:
    """A plan for a person: service by service, what changes and where it goes."""
    found: list[str] = []
    for service in plan.services:
        found += _service(service)
    found += [f"  warning: {shown(warning)}" for warning in plan.warnings]
    if all(service.action == "unchanged" for service in plan.services):
        found.append("  no changes")
    else:
        counts = {action: sum(s.action == action for s in plan.services)
                  for action in ("create", "update", "remove", "unchanged")}
        found.append("  plan: " + ", ".join(f"{n} to {a}" if a != "unchanged" else f"{n} unchanged"
                                            for a, n in counts.items() if n))
    return found


def _short(value: str) -> str:
    """A value on one line; of a digest the first 12 digits, by which people know it."""
    return _DIGEST.sub(r"\1…", shown(value))


def _service(service: ServicePlan) -> list[str]:
    if service.action == "unchanged":
        return [f"  {shown(service.name)}: unchanged"]
    how = f" ({service.strategy}: {shown(service.reason)})" if service.strategy else ""
    found = [f"  {shown(service.name)}: {service.action}{how}"]
    if service.action == "create":
        found.append(f"    image: {_short(service.image)}")
    for change in service.changes:
        old, new = _short(change.old) or "(none)", _short(change.new) or "(none)"
        found.append(f"    {shown(change.field)}: {old} → {new}")
    for place in service.placements:
        found.append(f"    on {shown(place.node)}{' (stays)' if place.kept else ''}")
    return found
