"""From an allocation in the state to the order that starts it: values resolved, secrets sealed."""

from __future__ import annotations

from typing import assert_never

from reconciler.executor.agent.orders import Env, Piece, Plain, Probe, Pull, Sealed, Start
from reconciler.fsm.records import Allocation, SecretPin
from reconciler.fsm.state import State
from reconciler.language.spec import AddressRef, Health, SecretRef, ServiceSpec, Template, Text

EAGER_AFTER_BAKE_MS = 2_000
"""How long past the settle time an allocation is still probed at a deploy's pace."""


def start_order(state: State, alloc: Allocation, term: int) -> Start | None:
    """The order that makes `alloc` run, or None where its spec is gone."""
    spec = state.spec_for(alloc)
    if spec is None:
        return None
    pins = {pin.name: pin.version for pin in _pins(state, alloc)}
    return Start(
        term=term, alloc=alloc.id, service=alloc.service, image=alloc.image,
        digest=alloc.digest, address=alloc.address, port=alloc.port,
        probe=probe_of(spec), command=spec.command, entrypoint=spec.entrypoint, user=spec.user,
        workdir=spec.workdir, read_only=spec.read_only, tmpfs=spec.tmpfs,
        env=_env(state, alloc, spec, pins), cpu_milli=spec.cpu_milli,
        memory_bytes=spec.memory_bytes, stop_timeout_ms=spec.stop_timeout_ms,
        restarts=alloc.restarts, auth=registry_auth(state, spec.registry_auth),
    )


def pull_order(state: State, alloc: Allocation, term: int) -> Pull:
    """The order that brings the allocation's image to its node."""
    spec = state.spec_for(alloc)
    auth = registry_auth(state, spec.registry_auth) if spec else None
    return Pull(term=term, image=alloc.image, digest=alloc.digest, auth=auth)


def registry_auth(state: State, name: str) -> Sealed | None:
    """The newest value of the secret that a registry asks for, sealed."""
    secret = state.secrets.get(name) if name else None
    if secret is None:
        return None
    newest = secret.versions[-1]
    return Sealed(name, newest.nonce, newest.sealed)


def _pins(state: State, alloc: Allocation) -> tuple[SecretPin, ...]:
    service = state.services.get(alloc.service)
    revision = service.revision(alloc.revision) if service else None
    if revision is not None:
        return revision.secrets
    deploy = state.deploys.get(alloc.deploy)
    change = deploy.change(alloc.service) if deploy else None
    return change.secrets if change else ()


def probe_of(spec: ServiceSpec) -> Probe:
    """How the service's allocations are probed, as an agent is told."""
    health: Health = spec.health
    return Probe(
        kind=health.kind, path=health.path, command=health.command,
        interval_ms=health.interval_ms, timeout_ms=health.timeout_ms, healthy=health.healthy,
        unhealthy=health.unhealthy, deadline_ms=health.deadline_ms,
        eager_ms=spec.bake_ms + EAGER_AFTER_BAKE_MS,
    )


def _env(
    state: State, alloc: Allocation, spec: ServiceSpec, pins: dict[str, int]
) -> tuple[Env, ...]:
    given = {
        "MILL_SERVICE": alloc.service, "MILL_ALLOC": alloc.id, "MILL_NODE": alloc.node,
    }
    if alloc.port is not None:
        given["PORT"] = str(alloc.port)
    own = {variable.key for variable in spec.env}
    fixed = [Env(key, (Plain(given[key]),)) for key in sorted(given) if key not in own]
    written = [Env(v.key, _pieces(state, alloc, v.value, pins)) for v in spec.env]
    return (*fixed, *written)


def _pieces(
    state: State, alloc: Allocation, template: Template, pins: dict[str, int]
) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    for part in template:
        match part:
            case Text():
                pieces.append(Plain(part.text))
            case SecretRef():
                pieces.append(_sealed(state, part.name, pins.get(part.name, 0)))
            case AddressRef():
                pieces.append(Plain(_address(state, alloc, part.service)))
            case _:
                assert_never(part)
    return tuple(pieces)


def _sealed(state: State, name: str, version: int) -> Sealed:
    secret = state.secrets[name]
    exact = next((v for v in secret.versions if v.version == version), secret.versions[-1])
    return Sealed(name, exact.nonce, exact.sealed)


def _address(state: State, alloc: Allocation, service: str) -> str:
    """`NAME.mill:PORT`, of the same deploy's spec before the live one's."""
    deploy = state.deploys.get(alloc.deploy)
    change = deploy.change(service) if deploy and not deploy.finished else None
    spec = state.specs.get(change.spec_hash) if change else None
    spec = spec or state.live_spec(service)
    return f"{service}.mill:{spec.port if spec and spec.port else 0}"
