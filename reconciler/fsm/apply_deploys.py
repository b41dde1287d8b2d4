"""Commands on deploys: from StartDeploy to the one terminal event."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from reconciler.fsm import commands as c
from reconciler.fsm import events as e
from reconciler.fsm.records import ENDED, Allocation, Change, Deploy, Revision, Service
from reconciler.fsm.state import State
from reconciler.fsm.step import Refused, emit, put, without
from reconciler.language.spec import ServiceSpec, spec_hash

KEPT_REVISIONS = 5
"""Revisions of a service that can be gone back to without a registry (design: Rollback)."""


def store_spec(state: State, command: c.StoreSpec) -> State | Refused:
    """Keep a piece; the last one makes the spec, whose hash must be the one it was sent under."""
    if command.spec_hash in state.specs:
        return state
    if not 0 <= command.part < command.parts:
        return Refused(f"piece {command.part} of {command.parts}")
    held = state.spec_parts.get(command.spec_hash, ())
    if command.part != len(held):
        # A leader that died between pieces leaves a beginning; its successor sends all again.
        if command.part != 0:
            return Refused(f"piece {command.part} of spec {command.spec_hash[:12]} out of order")
        held = ()
    held = (*held, command.data)
    if len(held) < command.parts:
        return replace(state, spec_parts=put(state.spec_parts, command.spec_hash, held))
    try:
        spec = msgspec.msgpack.decode(b"".join(held), type=ServiceSpec)
    except msgspec.DecodeError as error:
        return Refused(f"spec {command.spec_hash[:12]} cannot be read: {error}")
    if spec_hash(spec) != command.spec_hash:
        return Refused(f"spec {command.spec_hash[:12]} has another hash")
    return replace(
        state, specs=put(state.specs, command.spec_hash, spec),
        spec_parts=without(state.spec_parts, command.spec_hash),
    )


def start_deploy(state: State, command: c.StartDeploy) -> State | Refused:
    """Admit a deploy, if nothing it was planned on has moved."""
    running = state.running_deploy()
    if running is not None:
        return Refused(f"deploy {running.id} is running",
                       f"follow it with: mill deploy-show {running.id}, "
                       f"or end it with: mill cancel {running.id}")
    repeated = next((d.id for d in state.deploys.values() if command.key and d.key == command.key),
                    "")
    if repeated:
        return Refused(f"deploy {repeated} was made with the same Idempotency-Key",
                       f"follow it with: mill deploy-show {repeated}")
    for change in command.changes:
        stale = _stale(state, change)
        if stale:
            return Refused(stale, "plan it again")
    deploy = Deploy(
        id=f"d-{state.index}", changes=command.changes, origin=command.origin,
        started_ms=state.time_ms, deadline_ms=state.time_ms + command.budget_ms,
        key=command.key, warnings=command.warnings,
    )
    state = _new_services(state, command.changes)
    state = replace(
        state, deploys=put(state.deploys, deploy.id, deploy), active_deploy=deploy.id
    )
    return emit(state, deploy.id, e.Started(deploy.id, changed(deploy)))


def _stale(state: State, change: Change) -> str:
    service = state.services.get(change.service)
    live = service.live if service else 0
    if live != change.from_revision:
        return f"{change.service} is at revision {live}, not {change.from_revision}"
    if change.action in ("create", "update") and change.spec_hash not in state.specs:
        return f"the spec of {change.service} is not stored"
    for pin in change.secrets:
        secret = state.secrets.get(pin.name)
        if secret is None or all(v.version != pin.version for v in secret.versions):
            return f"version {pin.version} of secret {pin.name} is gone"
    for slot in change.slots:
        if slot.keep:
            alloc = state.allocations.get(slot.keep)
            if alloc is None or not alloc.live:
                return f"{slot.keep} runs no more"
    return ""


def _new_services(state: State, changes: tuple[Change, ...]) -> State:
    services = dict(state.services)
    next_vip = state.next_vip
    used = {service.vip for service in services.values()}
    for change in changes:
        if change.action == "create" and change.service not in services:
            vip, next_vip = _free_vip(next_vip, used)
            used.add(vip)
            services[change.service] = Service(name=change.service, vip=vip)
    return replace(state, services=services, next_vip=next_vip)


def _free_vip(start: int, used: set[str]) -> tuple[str, int]:
    """The next address of 10.97.0.0/16 that nobody has, going round; and where to go on."""
    number = start
    while True:
        number = number % 65_535 + 1
        vip = f"10.97.{number >> 8}.{number & 255}"
        if number & 255 not in (0, 255) and vip not in used:
            return vip, number


def changed(deploy: Deploy) -> int:
    """How many services the deploy changes."""
    return sum(change.action != "unchanged" for change in deploy.changes)


def _running(state: State, deploy_id: str) -> Deploy | Refused:
    deploy = state.deploys.get(deploy_id)
    if deploy is None:
        return Refused(f"no deploy {deploy_id}")
    if deploy.outcome != "running":
        return Refused(f"{deploy_id} is {deploy.outcome}")
    return deploy


def _keep(state: State, deploy: Deploy) -> State:
    return replace(state, deploys=put(state.deploys, deploy.id, deploy))


def begin_pulls(state: State, command: c.BeginPulls) -> State | Refused:
    """The stream's `pulling`."""
    deploy = _running(state, command.deploy)
    if isinstance(deploy, Refused):
        return deploy
    if deploy.pulls_begun:
        return Refused(f"{deploy.id} pulls already")
    return emit(_keep(state, replace(deploy, pulls_begun=True)), deploy.id, e.Pulling())


def record_pull(state: State, command: c.RecordPull) -> State | Refused:
    """One image on one node, once."""
    deploy = _running(state, command.deploy)
    if isinstance(deploy, Refused):
        return deploy
    if (command.image, command.node) in deploy.pulled:
        return Refused(f"{command.image} on {command.node} is recorded already")
    state = _keep(state, replace(deploy, pulled=(*deploy.pulled, (command.image, command.node))))
    return emit(state, deploy.id, e.Pulled(command.image, command.node, command.cached))


def finish_pulls(state: State, command: c.FinishPulls) -> State | Refused:
    """The last image is there."""
    deploy = _running(state, command.deploy)
    if isinstance(deploy, Refused):
        return deploy
    if deploy.pulls_done:
        return Refused(f"{deploy.id} has its images already")
    return emit(_keep(state, replace(deploy, pulls_done=True)), deploy.id, e.Pulled())


def pass_service(state: State, command: c.PassService) -> State | Refused:
    """The service's last replica is healthy."""
    deploy = _running(state, command.deploy)
    if isinstance(deploy, Refused):
        return deploy
    if command.service in deploy.healthy:
        return Refused(f"{command.service} has passed already")
    state = _keep(state, replace(deploy, healthy=(*deploy.healthy, command.service)))
    return emit(state, deploy.id, e.Healthy(command.service, command.elapsed_ms / 1000))


def commit_deploy(state: State, command: c.CommitDeploy) -> State | Refused:
    """The flip. Refused unless every slot of the plan is healthy (or kept and still live)."""
    deploy = _running(state, command.deploy)
    if isinstance(deploy, Refused):
        return deploy
    if deploy.committed:
        return Refused(f"{deploy.id} is committed already")
    filled: dict[str, dict[int, Allocation]] = {}
    for change in deploy.changes:
        slots = _filled(state, deploy, change)
        if isinstance(slots, Refused):
            return slots
        filled[change.service] = slots
    for change in deploy.changes:
        state = _flip(state, deploy, change, filled[change.service])
    return _keep(state, replace(deploy, committed=True))


def _filled(state: State, deploy: Deploy, change: Change) -> dict[int, Allocation] | Refused:
    """The allocation of each slot, or why one is not ready."""
    if change.action not in ("create", "update"):
        return {}
    new = {
        alloc.slot: alloc for alloc in state.of_deploy(deploy.id)
        if alloc.service == change.service and alloc.status == "healthy"
    }
    slots: dict[int, Allocation] = {}
    for number, slot in enumerate(change.slots):
        alloc = state.allocations.get(slot.keep) if slot.keep else new.get(number)
        if alloc is None or alloc.status in ENDED or (slot.keep and not alloc.live):
            return Refused(f"slot {number} of {change.service} is not healthy")
        slots[number] = alloc
    return slots


def _flip(state: State, deploy: Deploy, change: Change, slots: dict[int, Allocation]) -> State:
    service = state.services.get(change.service)
    if service is None:
        return state
    if change.action == "unchanged":
        service = replace(service, owner=change.owner, diverged=change.diverged)
        return replace(state, services=put(state.services, service.name, service))
    allocations = dict(state.allocations)
    chosen = {alloc.id for alloc in slots.values()}
    for alloc in state.of_service(change.service):
        if alloc.id not in chosen and alloc.status != "stopping":
            allocations[alloc.id] = replace(alloc, status="stopping", live=False)
    for number, alloc in slots.items():
        allocations[alloc.id] = replace(
            alloc, live=True, slot=number, revision=change.to_revision,
            routed=alloc.routed or alloc.port is not None,
        )
    if change.action == "remove":
        services = without(state.services, change.service)
    else:
        services = put(state.services, service.name, _revised(service, deploy, change, state))
    return replace(state, services=services, allocations=allocations)


def _revised(service: Service, deploy: Deploy, change: Change, state: State) -> Service:
    revision = Revision(
        number=change.to_revision, spec_hash=change.spec_hash, digest=change.digest,
        secrets=change.secrets, generation=change.generation, deploy=deploy.id,
        at_ms=state.time_ms,
    )
    return replace(
        service, live=change.to_revision, last_revision=change.to_revision,
        revisions=(*service.revisions, revision)[-KEPT_REVISIONS:],
        owner=change.owner, diverged=change.diverged,
    )


def route_deploy(state: State, command: c.RouteDeploy) -> State | Refused:
    """The edges send traffic to the new set."""
    deploy = _running(state, command.deploy)
    if isinstance(deploy, Refused):
        return deploy
    if not deploy.committed or deploy.routed:
        return Refused(f"{deploy.id} is not to be routed now")
    return emit(_keep(state, replace(deploy, routed=True)), deploy.id, e.Routed())


def finish_deploy(state: State, command: c.FinishDeploy) -> State | Refused:
    """Terminal: deployed."""
    deploy = _running(state, command.deploy)
    if isinstance(deploy, Refused):
        return deploy
    if changed(deploy) and not deploy.routed:
        return Refused(f"{deploy.id} is not routed yet")
    ended = replace(deploy, outcome="deployed", ended_ms=state.time_ms)
    state = collect_specs(replace(_keep(state, ended), active_deploy=""))
    return emit(state, deploy.id, e.Done(_elapsed(ended), changed(ended)))


def roll_back_deploy(state: State, command: c.RollBackDeploy) -> State | Refused:
    """Before the commit only: everything new is to stop, everything old was never touched."""
    deploy = _running(state, command.deploy)
    if isinstance(deploy, Refused):
        return deploy
    if deploy.committed:
        return Refused(f"{deploy.id} is committed: there is no way back but a new deploy",
                       "mill rollback SERVICE deploys an earlier revision")
    allocations = dict(state.allocations)
    for alloc in state.of_deploy(deploy.id):
        if alloc.status not in ENDED:
            allocations[alloc.id] = replace(alloc, status="stopping")
    state = replace(
        _keep(state, replace(deploy, outcome="rolling_back", failure=command.failure)),
        allocations=allocations,
    )
    return emit(state, deploy.id, e.RollingBack(command.failure.reason))


def end_rollback(state: State, command: c.EndRollback) -> State | Refused:
    """Terminal: what became of a deploy that did not go through."""
    deploy = state.deploys.get(command.deploy)
    if deploy is None or deploy.outcome != "rolling_back" or deploy.failure is None:
        return Refused(f"{command.deploy} is not being rolled back")
    ended = replace(deploy, outcome=command.outcome, ended_ms=state.time_ms)
    services = {
        name: service for name, service in state.services.items()
        if service.live or service.revisions
    }
    state = replace(_keep(state, ended), active_deploy="", services=services)
    failure = deploy.failure
    failed = e.Failed(
        _elapsed(ended), command.outcome, failure.service, failure.alloc, failure.node,
        failure.reason, failure.logs,
    )
    return emit(collect_specs(state), deploy.id, failed)


def warn_deploy(state: State, command: c.WarnDeploy) -> State | Refused:
    """A warning in the stream. Those that a deploy was admitted with are counted off."""
    deploy = state.deploys.get(command.deploy)
    if deploy is None:
        return Refused(f"no deploy {command.deploy}")
    if command.message in deploy.warnings[deploy.warned : deploy.warned + 1]:
        state = _keep(state, replace(deploy, warned=deploy.warned + 1))
    return emit(state, command.deploy, e.Warned(command.message))


def _elapsed(deploy: Deploy) -> float:
    return (deploy.ended_ms - deploy.started_ms) / 1000


def collect_specs(state: State) -> State:
    """Drop specs that no kept revision and no running deploy names."""
    needed = {r.spec_hash for s in state.services.values() for r in s.revisions}
    running = state.running_deploy()
    needed.update(change.spec_hash for change in (running.changes if running else ()))
    kept = {key: spec for key, spec in state.specs.items() if key in needed}
    if len(kept) == len(state.specs) and not state.spec_parts:
        return state
    return replace(state, specs=kept, spec_parts={})
