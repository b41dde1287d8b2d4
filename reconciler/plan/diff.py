"""What a deploy changes, service by service: the manifest against the live revisions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from reconciler.errors import Conflict
from reconciler.fsm.records import Action, FieldChange, Revision, SecretPin, Service
from reconciler.fsm.state import State
from reconciler.language.spec import ServiceSpec, run_hash, spec_hash
from reconciler.plan.fields import changed_fields, changed_secrets, pinned, secret_names

MANUAL = "manual"
"""The owner of what people deploy; every other owner is a source."""


class OwnedElsewhere(Conflict):
    """A service belongs to another source: 409."""


class RouteTaken(Conflict):
    """A route or edge port is claimed by a service outside of the manifest: 409."""


@dataclass(frozen=True, slots=True)
class Wish:
    """A service as it should be. `secrets` None: those it runs with where its containers stay,
    else the newest. `restart` asks for new containers though nothing else differs."""

    spec: ServiceSpec
    digest: str
    secrets: tuple[SecretPin, ...] | None = None
    restart: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceDiff:
    """What happens to one service.

    `spec` is None where it is removed, `old` where it is new. `keeps`: running containers may
    serve on. `records`: it is part of the deploy, though perhaps only its owner moves.
    """

    service: str
    action: Action
    spec: ServiceSpec | None
    old: ServiceSpec | None
    changes: tuple[FieldChange, ...] = ()
    spec_hash: str = ""
    digest: str = ""
    from_revision: int = 0
    to_revision: int = 0
    generation: int = 0
    secrets: tuple[SecretPin, ...] = ()
    owner: str = MANUAL
    diverged: bool = False
    keeps: bool = False
    records: bool = True
    warnings: tuple[str, ...] = ()


def diff(
    wishes: Iterable[Wish], state: State, *, owner: str = MANUAL, prune: bool = False
) -> tuple[ServiceDiff, ...]:
    """The changes that bring about `wishes`, by name, removals last.

    With `prune` the owner's services that are not wished for are removed. Raises OwnedElsewhere
    where a source asks for a service of another, RouteTaken where a route is claimed by a
    service outside of the wishes. Secrets named must exist in the state.
    """
    wished = sorted(wishes, key=lambda wish: wish.spec.name)
    _check_owners(wished, state, owner)
    gone = pruned({wish.spec.name for wish in wished}, state, owner) if prune else ()
    check_routes([wish.spec for wish in wished], state, gone)
    removals = (_removal(state.services[name], state) for name in gone)
    return (*(_compare(wish, state, owner) for wish in wished), *removals)


def pruned(names: Set[str], state: State, owner: str) -> tuple[str, ...]:
    """The live services of `owner` that are not among `names`, sorted: what a prune removes."""
    return tuple(
        name for name, service in sorted(state.services.items())
        if service.live and service.owner == owner and name not in names
    )


def newest(spec: ServiceSpec, state: State) -> tuple[SecretPin, ...]:
    """The newest version of each secret that the spec's containers use."""
    return tuple(
        SecretPin(name, state.secrets[name].versions[-1].version) for name in secret_names(spec)
    )


def live_revision(service: Service | None) -> Revision | None:
    """The committed revision, where there is one."""
    return service.revision(service.live) if service else None


def check_routes(specs: Sequence[ServiceSpec], state: State, gone: Iterable[str] = ()) -> None:
    """Raise RouteTaken where a route or port of `specs` is held by another live service.

    `gone` are services that the deploy removes.
    """
    out = {*gone, *(spec.name for spec in specs)}
    held: dict[object, Service] = {}
    for name, service in sorted(state.services.items()):
        spec = None if name in out else state.live_spec(name)
        for route in spec.routes if spec else ():
            held[(route.host, route.path)] = service
        for listen in spec.listens if spec else ():
            held[(listen.protocol, listen.port)] = service
    for spec in specs:
        for route in spec.routes:
            _check_free(spec, held.get((route.host, route.path)),
                        f"route {route.host}{route.path}")
        for listen in spec.listens:
            _check_free(spec, held.get((listen.protocol, listen.port)),
                        f"{listen.protocol} port {listen.port}")


def _check_free(spec: ServiceSpec, holder: Service | None, what: str) -> None:
    if holder is not None:
        raise RouteTaken(
            f"{what} of {spec.name} is claimed by {holder.name}, owned by {holder.owner}",
            hint=f"give {spec.name} another host or path, or take the route from {holder.name} "
                 "first",
        )


def _check_owners(wishes: Sequence[Wish], state: State, owner: str) -> None:
    for wish in wishes:
        service = state.services.get(wish.spec.name)
        if service and service.live and owner != MANUAL and service.owner not in (MANUAL, owner):
            raise OwnedElsewhere(
                f"{service.name} belongs to source {service.owner}",
                hint=f"rename the service in source {owner}, or remove it from source "
                     f"{service.owner} first",
            )


def _removal(service: Service, state: State) -> ServiceDiff:
    revision = live_revision(service)
    warning = (
        f"{service.name} is removed together with the hotfix that was deployed over it"
        if service.diverged else ""
    )
    return ServiceDiff(
        service=service.name, action="remove", spec=None, old=state.live_spec(service.name),
        digest=revision.digest if revision else "", from_revision=service.live,
        owner=service.owner, warnings=(warning,) if warning else (),
    )


def _compare(wish: Wish, state: State, owner: str) -> ServiceDiff:
    service = state.services.get(wish.spec.name)
    live = live_revision(service)
    if service is None or live is None:
        return ServiceDiff(
            service=wish.spec.name, action="create", spec=wish.spec, old=None,
            spec_hash=spec_hash(wish.spec), digest=wish.digest,
            to_revision=(service.last_revision if service else 0) + 1,
            secrets=newest(wish.spec, state) if wish.secrets is None else wish.secrets,
            owner=owner,
        )
    if _hotfixed(wish, service, owner, state):
        return _unchanged(wish, service, live, state, diverged=True)
    old = state.specs[live.spec_hash]
    wanted = spec_hash(wish.spec)
    same_spec = wanted == live.spec_hash
    same_run = wish.digest == live.digest and (
        same_spec or run_hash(wish.spec) == run_hash(old)
    )
    pins = _pins(wish, live, state, same_run)
    keeps = same_run and pins == live.secrets and not wish.restart
    if same_spec and keeps:
        return _unchanged(wish, service, live, state, owner=owner)
    # A source that deploys its own service ends a hotfix; a person's change begins one.
    own = service.owner if owner == MANUAL else owner
    return ServiceDiff(
        service=service.name, action="update", spec=wish.spec, old=old,
        changes=_changes(old, live, wish, pins), spec_hash=wanted, digest=wish.digest,
        from_revision=service.live, to_revision=service.last_revision + 1,
        generation=live.generation + wish.restart, secrets=pins, owner=own,
        diverged=_diverges(service, owner, same_spec and wish.digest == live.digest),
        keeps=keeps, warnings=_stale_secrets(wish.spec, pins, state),
    )


def _diverges(service: Service, owner: str, same: bool) -> bool:
    if owner != MANUAL or service.owner == MANUAL:
        return False
    return service.diverged or not same


def _pins(
    wish: Wish, live: Revision, state: State, same_run: bool
) -> tuple[SecretPin, ...]:
    if wish.secrets is not None:
        return wish.secrets
    if same_run and not wish.restart:
        return live.secrets
    return newest(wish.spec, state)


def _unchanged(
    wish: Wish, service: Service, live: Revision, state: State, *,
    owner: str = MANUAL, diverged: bool = False,
) -> ServiceDiff:
    """Nothing runs differently; a source may adopt the service, or find its hotfix merged."""
    own = service.owner if owner == MANUAL else owner
    still = diverged or (service.diverged and owner == MANUAL)
    moves = own != service.owner or still != service.diverged
    warnings = _stale_secrets(state.specs[live.spec_hash], live.secrets, state)
    if diverged:
        warnings += (f"{service.name} keeps its hotfix: this commit does not change it",)
    return ServiceDiff(
        service=service.name, action="unchanged", spec=state.specs[live.spec_hash],
        old=state.specs[live.spec_hash],
        changes=(FieldChange("owner", service.owner, own),) if own != service.owner else (),
        spec_hash=live.spec_hash, digest=live.digest, from_revision=service.live,
        to_revision=service.live, generation=live.generation, secrets=live.secrets,
        owner=own, diverged=still, keeps=True, records=moves, warnings=warnings,
    )


def _hotfixed(wish: Wish, service: Service, owner: str, state: State) -> bool:
    """The source asks for what it had deployed before the hotfix, so the hotfix stays.

    Not so where that is what runs: then the branch has come to say the same.

    Its last revision is found by the deploy that made it; where that is forgotten (deploys are
    kept a day), the commit wins.
    """
    if not service.diverged or owner == MANUAL or service.owner != owner:
        return False
    wanted = spec_hash(wish.spec)
    live = live_revision(service)
    if live is not None and live.spec_hash == wanted:
        return False
    for revision in reversed(service.revisions):
        deploy = state.deploys.get(revision.deploy)
        if deploy is not None and deploy.origin.kind == "git" and deploy.origin.source == owner:
            return revision.spec_hash == wanted
    return False


def _changes(
    old: ServiceSpec, live: Revision, wish: Wish, pins: tuple[SecretPin, ...]
) -> tuple[FieldChange, ...]:
    changes = []
    before, after = pinned(old.image, live.digest), pinned(wish.spec.image, wish.digest)
    if before != after:
        changes.append(FieldChange("image", before, after))
    changes += changed_fields(old, wish.spec)
    changes += changed_secrets(live.secrets, pins)
    return tuple(changes)


def _stale_secrets(
    spec: ServiceSpec, pins: tuple[SecretPin, ...], state: State
) -> tuple[str, ...]:
    """A warning for containers that run with an older version of a secret than there is."""
    current = {pin.name: pin.version for pin in pins}
    stale = [
        name for name in secret_names(spec)
        if name in state.secrets and name in current
        and state.secrets[name].versions[-1].version > current[name]
    ]
    if not stale:
        return ()
    noun = "secret" if len(stale) == 1 else "secrets"
    return (f"{spec.name} runs with an older version of {noun} {', '.join(stale)}: "
            f"mill restart {spec.name} takes the newest",)
