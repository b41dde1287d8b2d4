"""What only the cluster can tell about a manifest, as problems at their place in its text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from reconciler.executor.resolve import Unresolved
from reconciler.fsm.state import State
from reconciler.language.problems import MAX_PROBLEMS, InvalidManifest, Problem
from reconciler.language.read import Position, Reading
from reconciler.language.unbuilt import unbuilt
from reconciler.plan.diff import MANUAL
from reconciler.plan.references import Dangling, dangling, dependency_cycle


def unbuilt_problems(reading: Reading) -> list[Problem]:
    """What the manifest asks for that no part can do yet."""
    return [
        _problem(reading.at(one.name, one.field), f"not built yet: {one.what}",
                 "leave it out until a version of mill says that it is there")
        for one in unbuilt(reading.manifest)
    ]


def reference_problems(
    reading: Reading, state: State, gone: Sequence[str]
) -> list[Problem]:
    """Secrets and services of other manifests that are not there, and cycles through them."""
    specs = reading.manifest.services
    removed = frozenset(gone)
    found = [
        _problem(position, one.message, one.hint)
        for one in dangling(specs, state, removed)
        for position in _positions(reading, one)
    ]
    ring = dependency_cycle(specs, state, removed)
    if ring:
        at = next((name for name in ring if name in reading.positions), None)
        position = reading.at(at, "depends_on") if at else Position("", 1, 1)
        found.append(_problem(position, f"dependencies in a cycle: {' → '.join(ring)}",
                              "none of them could start first; take one dependency out"))
    return found


def claim_problems(reading: Reading, state: State, owner: str) -> list[Problem]:
    """Services and hosts that a source may not claim; its patterns may hold `*`."""
    source = state.sources.get(owner) if owner != MANUAL else None
    if source is None:
        return []
    found: list[Problem] = []
    for spec in reading.manifest.services:
        if not _allowed(spec.name, source.services):
            found.append(_problem(
                reading.at(spec.name), f"source {owner} may not claim service {spec.name}",
                f"it may claim: {', '.join(source.services)}"))
        found += [
            _problem(reading.at(spec.name, f"route.{route.host}{route.path}"),
                     f"source {owner} may not claim the host {route.host}",
                     f"it may claim: {', '.join(source.hosts)}")
            for route in spec.routes if not _allowed(route.host, source.hosts)
        ]
    return found


def image_problems(reading: Reading, unresolved: Iterable[Unresolved]) -> list[Problem]:
    """Images that stand for no digest."""
    return [
        _problem(reading.at(one.service, "image"),
                 f"the image {one.image} cannot be resolved: {one.reason}",
                 one.hint or "check the name, the tag and the registry")
        for one in unresolved
    ]


def refuse(problems: Iterable[Problem]) -> None:
    """Raise InvalidManifest (422) with all `problems` in the order of the files, if any."""
    ordered = sorted(set(problems), key=lambda p: (p.file, p.line, p.column, p.message))
    if ordered:
        omitted = max(0, len(ordered) - MAX_PROBLEMS)
        raise InvalidManifest(ordered[:MAX_PROBLEMS], omitted)


def _allowed(name: str, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def _positions(reading: Reading, one: Dangling) -> list[Position]:
    """Every place that names it, or else the field that does."""
    kind = "service" if one.kind == "address" else "secret"
    places = [
        reference.position for reference in reading.references
        if reference.owner == one.service and reference.name == one.name
        and reference.kind == kind
    ]
    return places or [reading.at(one.service, one.kind)]


def _problem(position: Position, message: str, hint: str) -> Problem:
    return Problem(position.file, position.line, position.column, message, hint)
