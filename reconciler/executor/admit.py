"""Admission: from a request to a StartDeploy that can be proposed, or a refusal that says why.

Nothing is written here. What can fail fails now: the text, its references, images, ownership,
routes, room. What moves between the plan and its proposal is refused by the state machine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from msgspec.structs import replace

from reconciler.errors import Conflict, NotFound, Unprocessable
from reconciler.executor.admit_checks import (
    claim_problems,
    image_problems,
    reference_problems,
    refuse,
    unbuilt_problems,
)
from reconciler.executor.requests import DEFAULT_PULL_BUDGET_MS, DeployRequest
from reconciler.executor.resolve import Resolve, Unseal, resolve_images
from reconciler.fsm.codec import MAX_COMMAND_BYTES, Entry, encode_entry
from reconciler.fsm.commands import StartDeploy, StoreSpec
from reconciler.fsm.records import Origin, Revision, Service
from reconciler.fsm.state import State
from reconciler.language.read import Reading
from reconciler.language.spec import ServiceSpec, Strategy, canonical
from reconciler.plan.diff import Wish, pruned
from reconciler.plan.explain import PlanView
from reconciler.plan.plan import Plan, make_plan
from reconciler.plan.references import dangling

SPEC_PART_BYTES = 240 * 1024
"""Pieces of a spec in the log: under 256 KiB with what the command adds."""

MAX_REPLICAS = 1_000
_LATEST_MS = 2**53
"""A time as long as any in an entry, so that the measured size is the largest."""


class Reads(Protocol):
    """Parses manifests where no text can slow the cluster: `executor.reading.Reader`."""

    async def read(
        self, files: Mapping[str, bytes], variables: Mapping[str, str]
    ) -> Reading:
        """What the files say, mistakes included."""
        ...


@dataclass(frozen=True, slots=True, order=True)
class ImagePull:
    """An image that a node needs before the deploy can start there."""

    node: str
    image: str
    digest: str
    registry_auth: str


@dataclass(frozen=True, slots=True)
class Admitted:
    """Propose `stores` in order, then `start`.

    No changes in `start`: the deploy only says so and ends.
    """

    start: StartDeploy
    stores: tuple[StoreSpec, ...]
    images: tuple[ImagePull, ...]
    view: PlanView


@dataclass(frozen=True, slots=True)
class Repeated:
    """The Idempotency-Key is that of a kept deploy: this one."""

    deploy: str


class DeployRunning(Conflict):
    """One deploy runs at a time: 409, naming it."""

    def __init__(self, deploy: str) -> None:
        super().__init__(
            f"deploy {deploy} is running",
            hint=f"follow it with: mill deploy-show {deploy}, or end it with: mill cancel {deploy}",
        )
        self.deploy = deploy


@dataclass(frozen=True, slots=True)
class Admission:
    """Admits deploys on the leader. `state` is a linearizable read."""

    state: Callable[[], Awaitable[State]]
    reader: Reads
    resolve: Resolve
    unseal: Unseal

    async def plan(self, request: DeployRequest) -> PlanView:
        """What a deploy of this request would do. Refuses what `admit` would, but for a deploy
        that runs: a plan waits for nobody."""
        reading = await self._read(request)
        return (await self._plan(request, reading, await self.state())).view

    async def admit(self, request: DeployRequest) -> Admitted | Repeated:
        """The deploy to propose.

        Raises InvalidManifest and Unprocessable (422), DeployRunning, OwnedElsewhere, RouteTaken
        and DoesNotFit (409).
        """
        state = await self.state()
        known = _known(state, request.key)
        if known is not None:
            return known
        reading = await self._read(request)
        while True:
            plan = await self._plan(request, reading, state)
            newest = await self.state()
            if newest.deploys.keys() == state.deploys.keys():
                return _admitted(plan, state, request.origin, request.key,
                                 request.pull_budget_ms)
            # Registries take their time: another deploy came and went, and took routes and room.
            state = newest
            known = _known(state, request.key)
            if known is not None:
                return known

    async def scale(
        self, name: str, replicas: int, origin: Origin, key: str = ""
    ) -> Admitted | Repeated:
        """The live spec with other replicas; what runs stays where it is. 404 unknown."""
        state = await self.state()
        known = _known(state, key)
        if known is not None:
            return known
        if not 0 <= replicas <= MAX_REPLICAS:
            raise Unprocessable(f"{name} cannot have {replicas} replicas",
                                hint=f"0 to {MAX_REPLICAS} are possible")
        _, live, spec = _live(state, name)
        wish = Wish(replace(spec, replicas=replicas), live.digest)
        return _admitted(_lone_plan(wish, state), state, origin, key)

    async def restart(self, name: str, origin: Origin, key: str = "") -> Admitted | Repeated:
        """The live spec and image in new containers, with the newest secrets. 404 unknown."""
        state = await self.state()
        known = _known(state, key)
        if known is not None:
            return known
        _, live, spec = _live(state, name)
        wish = Wish(spec, live.digest, restart=True)
        return _admitted(_lone_plan(wish, state), state, origin, key)

    async def rollback(
        self, name: str, to: int | None, origin: Origin, key: str = ""
    ) -> Admitted | Repeated:
        """An earlier kept revision: its spec, image and secrets. None: the one before the live
        one. 404 unknown, 409 where it cannot be had any more."""
        state = await self.state()
        known = _known(state, key)
        if known is not None:
            return known
        service, _, _ = _live(state, name)
        target = _earlier(service, to)
        spec = state.specs[target.spec_hash]
        _check_pins(name, target, state)
        wish = Wish(spec, target.digest, secrets=target.secrets)
        return _admitted(_lone_plan(wish, state), state, origin, key)

    async def _read(self, request: DeployRequest) -> Reading:
        """The manifest, right in itself and within what is built."""
        _check_strategy(request.strategy)
        reading = await self.reader.read(request.files, request.variables)
        reading.valid()
        refuse(unbuilt_problems(reading))
        return reading

    async def _plan(self, request: DeployRequest, reading: Reading, state: State) -> Plan:
        specs = reading.manifest.services
        names = {spec.name for spec in specs}
        gone = pruned(names, state, request.owner) if request.prune else ()
        refuse([
            *claim_problems(reading, state, request.owner),
            *reference_problems(reading, state, gone),
        ])
        resolved = await resolve_images(specs, state, self.resolve, self.unseal)
        refuse(image_problems(reading, resolved.unresolved))
        wishes = [Wish(spec, resolved.digests[spec.name]) for spec in specs]
        return make_plan(wishes, state, owner=request.owner, prune=request.prune,
                         warnings=resolved.warnings)


def _known(state: State, key: str) -> Repeated | None:
    """The deploy that this key has made already; else nothing may be running."""
    if key:
        for deploy in state.deploys.values():
            if deploy.key == key:
                return Repeated(deploy.id)
    running = state.running_deploy()
    if running is not None:
        raise DeployRunning(running.id)
    return None


def _check_strategy(strategy: Strategy | None) -> None:
    if strategy in ("rolling", "recreate"):
        raise Unprocessable(f"strategy {strategy} is not built yet",
                            hint="use surge, or auto, which is surge wherever it fits")


def _live(state: State, name: str) -> tuple[Service, Revision, ServiceSpec]:
    service = state.services.get(name)
    revision = service.revision(service.live) if service else None
    if service is None or revision is None:
        raise NotFound(f"no service {name}", hint="mill services lists them")
    return service, revision, state.specs[revision.spec_hash]


def _earlier(service: Service, to: int | None) -> Revision:
    numbers = [revision.number for revision in service.revisions]
    kept = f"kept revisions: {', '.join(map(str, numbers))}; {service.live} is live"
    if to is None:
        before = [number for number in numbers if number < service.live]
        if not before:
            raise Conflict(f"{service.name} has no revision before {service.live}", hint=kept)
        to = max(before)
    if to == service.live:
        raise Conflict(f"{service.name} runs revision {to} already", hint=kept)
    revision = service.revision(to)
    if revision is None:
        raise NotFound(f"{service.name} has no revision {to}", hint=kept)
    return revision


def _check_pins(name: str, target: Revision, state: State) -> None:
    for pin in target.secrets:
        secret = state.secrets.get(pin.name)
        if secret is None or all(v.version != pin.version for v in secret.versions):
            raise Conflict(f"revision {target.number} of {name} ran with version {pin.version} "
                           f"of secret {pin.name}, which is gone",
                           hint="deploy the manifest instead: it takes the newest secrets")


def _lone_plan(wish: Wish, state: State) -> Plan:
    """The plan for one service that is live already, asked for by a person."""
    lacks = dangling([wish.spec], state)
    if lacks:
        raise Unprocessable("; ".join(one.message for one in lacks), hint=lacks[0].hint)
    return make_plan([wish], state)


def _admitted(
    plan: Plan, state: State, origin: Origin, key: str,
    pull_budget_ms: int = DEFAULT_PULL_BUDGET_MS,
) -> Admitted:
    start = StartDeploy(
        changes=plan.changes, origin=origin, budget_ms=plan.budget_ms(pull_budget_ms), key=key,
        warnings=plan.warnings,
    )
    size_bytes = len(encode_entry(Entry(_LATEST_MS, start)))
    if size_bytes > MAX_COMMAND_BYTES:
        raise Unprocessable(
            f"the deploy is too large for the log: {size_bytes // 1024} KiB, "
            f"{MAX_COMMAND_BYTES // 1024} KiB at most",
            hint="deploy the services in several manifests, or with fewer replicas",
        )
    return Admitted(start, _stores(plan, state), _images(plan), plan.view)


def _stores(plan: Plan, state: State) -> tuple[StoreSpec, ...]:
    """The specs that the log does not have yet, in pieces."""
    new = {
        one.spec_hash: one.spec for one in plan.diffs
        if one.spec is not None and one.spec_hash not in state.specs
    }
    return tuple(
        StoreSpec(key, part, len(pieces), piece)
        for key in sorted(new)
        for pieces in (_pieces(canonical(new[key])),)
        for part, piece in enumerate(pieces)
    )


def _pieces(data: bytes) -> Sequence[bytes]:
    return [data[at : at + SPEC_PART_BYTES] for at in range(0, len(data), SPEC_PART_BYTES)]


def _images(plan: Plan) -> tuple[ImagePull, ...]:
    specs = {one.service: one.spec for one in plan.diffs}
    return tuple(sorted({
        ImagePull(slot.node, spec.image, change.digest, spec.registry_auth)
        for change in plan.changes
        if (spec := specs[change.service]) is not None
        for slot in change.slots
        if not slot.keep
    }))
