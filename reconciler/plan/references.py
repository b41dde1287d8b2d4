"""What a manifest names beyond itself: secrets, and services of other manifests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Literal

from reconciler.fsm.state import State
from reconciler.language.spec import ServiceSpec
from reconciler.plan.fields import address_names, secret_names
from reconciler.plan.order import cycle

ReferenceKind = Literal["secret", "registry_auth", "depends_on", "address"]


@dataclass(frozen=True, slots=True)
class Dangling:
    """`service` names something that is not there. `name` is what it names."""

    service: str
    kind: ReferenceKind
    name: str
    message: str
    hint: str


def dangling(
    specs: Sequence[ServiceSpec], state: State, gone: Set[str] = frozenset()
) -> tuple[Dangling, ...]:
    """References that neither the manifest nor the state can satisfy, by service.

    `gone` are services that the deploy removes.
    """
    own = {spec.name: spec for spec in specs}
    found: list[Dangling] = []
    for spec in sorted(specs, key=lambda s: s.name):
        found += _secrets(spec, state)
        found += _dependencies(spec, own, state, gone)
        found += _addresses(spec, own, state, gone)
    return tuple(found)


def dependency_cycle(
    specs: Sequence[ServiceSpec], state: State, gone: Set[str] = frozenset()
) -> tuple[str, ...]:
    """A cycle that the manifest closes together with live services, `("a", "b", "a")`."""
    needs = {
        name: spec.depends_on
        for name in sorted(state.services)
        if name not in gone and (spec := state.live_spec(name)) is not None
    }
    needs |= {spec.name: spec.depends_on for spec in specs}
    return cycle(needs)


def strained(
    specs: Sequence[ServiceSpec], state: State, gone: Set[str] = frozenset()
) -> tuple[str, ...]:
    """Warnings for what runs on unchanged while a service that it names goes or moves its port."""
    before = {name: state.live_spec(name) for name in sorted(state.services)}
    after = before | {spec.name: spec for spec in specs}
    warnings: list[str] = []
    for name, spec in sorted(after.items()):
        if spec is None or name in gone:
            continue
        named = sorted({*spec.depends_on, *address_names(spec)})
        warnings += [f"{name} needs {other}, which this removes"
                     for other in named if other in gone]
        if before.get(name) == spec:
            warnings += [
                f"{name} runs on with the old port of {other}: mill restart {name} takes the new"
                for other in address_names(spec)
                if _moved(before.get(other), after.get(other))
            ]
    return tuple(warnings)


def _moved(old: ServiceSpec | None, new: ServiceSpec | None) -> bool:
    return old is not None and new is not None and old.port != new.port


def _secrets(spec: ServiceSpec, state: State) -> Iterable[Dangling]:
    names: list[tuple[ReferenceKind, str]] = [("secret", name) for name in secret_names(spec)]
    if spec.registry_auth:
        names.append(("registry_auth", spec.registry_auth))
    for kind, name in names:
        if name not in state.secrets:
            yield Dangling(spec.name, kind, name, f"no secret `{name}` for service {spec.name}",
                           f"set it with: mill secret set {name}")


def _dependencies(
    spec: ServiceSpec, own: dict[str, ServiceSpec], state: State, gone: Set[str]
) -> Iterable[Dangling]:
    for name in spec.depends_on:
        if name not in own and _live(name, state, gone) is None:
            yield Dangling(spec.name, "depends_on", name,
                           f"service {spec.name} depends on `{name}`, which does not exist",
                           "deploy it first, or together with this")


def _addresses(
    spec: ServiceSpec, own: dict[str, ServiceSpec], state: State, gone: Set[str]
) -> Iterable[Dangling]:
    for name in address_names(spec):
        target = own.get(name) or _live(name, state, gone)
        if target is None:
            yield Dangling(spec.name, "address", name,
                           f"service {spec.name} names the address of `{name}`, "
                           "which does not exist",
                           "deploy it first, or together with this")
        elif target.port is None:
            yield Dangling(spec.name, "address", name,
                           f"service {spec.name} names the address of `{name}`, "
                           "which has no port",
                           f"give {name} a port")


def _live(name: str, state: State, gone: Set[str]) -> ServiceSpec | None:
    return None if name in gone else state.live_spec(name)
