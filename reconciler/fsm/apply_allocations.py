"""Commands on allocations: placed, moved on, ended."""

from __future__ import annotations

from msgspec.structs import replace

from reconciler.fsm import commands as c
from reconciler.fsm.events import Healthy, Note, Scheduled, Starting, Stopped
from reconciler.fsm.records import ENDED, Allocation, AllocStatus, Deploy, Node
from reconciler.fsm.state import State
from reconciler.fsm.step import Refused, emit, put

_NEXT: dict[AllocStatus, frozenset[AllocStatus]] = {
    "pending": frozenset({"pulling", "starting", "stopping", "stopped", "failed", "lost"}),
    "pulling": frozenset({"starting", "stopping", "stopped", "failed", "lost"}),
    "starting": frozenset({"running", "stopping", "stopped", "failed", "lost"}),
    "running": frozenset({"healthy", "starting", "stopping", "stopped", "failed", "lost"}),
    "healthy": frozenset({"running", "starting", "stopping", "stopped", "failed", "lost"}),
    "stopping": frozenset({"stopped", "failed", "lost"}),
    "stopped": frozenset(),
    "failed": frozenset(),
    "lost": frozenset(),
}
"""Which state may follow which; nothing revives what has ended."""


def schedule_alloc(state: State, command: c.ScheduleAlloc) -> State | Refused:
    """Place one allocation, for a slot of the running deploy or to heal a live service."""
    node = state.nodes.get(command.node)
    if node is None or node.status != "ready":
        return Refused(f"{command.node} is not ready")
    if command.alloc in state.allocations:
        return Refused(f"{command.alloc} exists already")
    taken = _holder(state, command)
    if taken:
        return Refused(f"slot {command.slot} of {command.service} is held by {taken}")
    host = _free_host(state, node)
    if host is None:
        return Refused(f"{node.name} has no free address", "each node has 253 of them")
    made = _allocation(state, command, f"10.77.{node.number}.{host}")
    if isinstance(made, Refused):
        return made
    state = replace(
        state,
        allocations=put(state.allocations, made.id, made),
        nodes=put(state.nodes, node.name, replace(node, next_host=host + 1)),
    )
    return emit(state, command.deploy, Scheduled(made.service, made.id, made.node))


def _holder(state: State, command: c.ScheduleAlloc) -> str:
    """The allocation that fills the same slot already, if one does."""
    for alloc in state.of_service(command.service):
        if alloc.slot != command.slot or alloc.status == "stopping":
            continue
        if command.deploy:
            holds = alloc.deploy == command.deploy and not alloc.live
        else:
            holds = alloc.live and not _makes_way(state, alloc, command)
        if holds:
            return alloc.id
    return ""


def _makes_way(state: State, alloc: Allocation, command: c.ScheduleAlloc) -> bool:
    """It is the one to be replaced, since its node is draining."""
    node = state.nodes.get(alloc.node)
    return alloc.id == command.replaces and node is not None and node.draining


def _free_host(state: State, node: Node) -> int | None:
    """The next address of the node's /24 (2 to 254), going round, so that one comes back late."""
    used = {int(alloc.address.rpartition(".")[2]) for alloc in state.of_node(node.name)}
    start = node.next_host if 2 <= node.next_host <= 254 else 2
    hosts: list[int] = [*range(start, 255), *range(2, start)]
    for host in hosts:
        if host not in used:
            return host
    return None


def _allocation(state: State, command: c.ScheduleAlloc, address: str) -> Allocation | Refused:
    service = state.services.get(command.service)
    if service is None:
        return Refused(f"no service {command.service}")
    if command.deploy:
        deploy = state.deploys.get(command.deploy)
        if deploy is None or deploy.outcome != "running" or deploy.committed:
            return Refused(f"{command.deploy} is not running")
        change = deploy.change(command.service)
        if change is None or not 0 <= command.slot < len(change.slots):
            return Refused(f"{command.deploy} has no slot {command.slot} of {command.service}")
        number, digest, spec_hash = change.to_revision, change.digest, change.spec_hash
    else:
        revision = service.revision(service.live)
        if revision is None:
            return Refused(f"{command.service} is not live")
        if command.revision not in (0, revision.number):
            return Refused(f"{command.service} is at revision {revision.number}, "
                           f"not {command.revision}")
        number, digest, spec_hash = revision.number, revision.digest, revision.spec_hash
    spec = state.specs[spec_hash]
    return Allocation(
        id=command.alloc, service=command.service, revision=number, slot=command.slot,
        node=command.node, address=address, deploy=command.deploy, image=spec.image,
        digest=digest, port=spec.port, cpu_milli=spec.cpu_milli,
        memory_bytes=spec.memory_bytes, live=not command.deploy, attempt=command.attempt,
        replaces=command.replaces, scheduled_ms=state.time_ms,
    )


def set_alloc_status(state: State, command: c.SetAllocStatus) -> State | Refused:
    """Move an allocation on, if it still is where the leader thought."""
    alloc = state.allocations.get(command.alloc)
    if alloc is None:
        return Refused(f"no allocation {command.alloc}")
    again = command.status == alloc.status == "starting" \
        and (command.restarts or 0) > alloc.restarts  # it ended before anybody saw it run
    if alloc.status != command.was or not (again or command.status in _NEXT[alloc.status]):
        return Refused(f"{alloc.id} is {alloc.status}, not on the way to {command.status}")
    moved = _moved(state, alloc, command)
    state = replace(state, allocations=put(state.allocations, moved.id, moved))
    return _tell(state, moved, command)


def retire_alloc(state: State, command: c.RetireAlloc) -> State | Refused:
    """Of two that fill a slot, one goes: never the one that serves alone."""
    alloc = state.allocations.get(command.alloc)
    successor = state.allocations.get(command.successor)
    if alloc is None or not alloc.live or alloc.status != command.was:
        return Refused(f"{command.alloc} is {alloc.status if alloc else 'gone'}, "
                       f"not {command.was} and live")
    if successor is None or successor.id == alloc.id or not successor.live \
            or (successor.service, successor.slot) != (alloc.service, alloc.slot) \
            or successor.status in ENDED or successor.status == "stopping":
        return Refused(f"{command.successor} does not fill the slot of {alloc.id}")
    if alloc.status == "healthy" and successor.status != "healthy":
        return Refused(f"{successor.id} is {successor.status}, and {alloc.id} serves")
    deploy = state.running_deploy()
    change = deploy.change(alloc.service) if deploy and not deploy.committed else None
    if deploy and change and any(slot.keep == alloc.id for slot in change.slots):
        return Refused(f"{deploy.id} keeps {alloc.id}")
    retired = replace(alloc, status="stopping", live=False)
    state = replace(state, allocations=put(state.allocations, retired.id, retired))
    return emit(state, "", Note(kind="moved", subject=alloc.id, node=alloc.node,
                                message=f"{successor.id} on {successor.node} takes its place"))


def _moved(state: State, alloc: Allocation, command: c.SetAllocStatus) -> Allocation:
    if command.status in ENDED:
        ended = end_alloc(alloc, command.status, state.time_ms, command.reason)
        return replace(ended, exit_code=command.exit_code)
    moved = replace(alloc, status=command.status, reason=command.reason or alloc.reason)
    if command.restarts is not None:
        moved = replace(moved, restarts=command.restarts, exit_code=command.exit_code)
    if command.status == "starting":
        moved = replace(moved, started_ms=state.time_ms)
    if command.status == "healthy":
        service = state.services.get(alloc.service)
        serves = alloc.port is not None and (alloc.live or not (service and service.live))
        moved = replace(moved, healthy_ms=state.time_ms, reason="",
                        routed=alloc.routed or serves)
    return moved


def end_alloc(alloc: Allocation, status: AllocStatus, time_ms: int, reason: str) -> Allocation:
    """The allocation as it ended: out of the committed set, its resources free."""
    return replace(
        alloc, status=status, live=False, routed=False, ended_ms=time_ms,
        reason=reason or alloc.reason,
    )


def _tell(state: State, alloc: Allocation, command: c.SetAllocStatus) -> State:
    """The event of a move. A deploy's stream has its own new allocations, and, once it is
    committed, the end of the old ones; a rollback's clean-up is no part of it."""
    deploy = state.running_deploy()
    ours = deploy.id if deploy and alloc.deploy == deploy.id and not deploy.committed else ""
    match command.status:
        case "starting":
            if alloc.restarts:
                return emit(state, ours, Note(kind="restarting", subject=alloc.id,
                                              message=alloc.reason, node=alloc.node))
            return emit(state, ours, Starting(alloc.service, alloc.id, alloc.node))
        case "healthy":
            seconds = command.elapsed_ms / 1000
            return emit(state, ours, Healthy(alloc.service, seconds, alloc.id, alloc.node))
        case "stopped":
            retired = deploy.id if deploy and _retires(deploy, alloc) else ""
            return emit(state, retired, Stopped(alloc.service, alloc.id, alloc.node))
        case "failed" | "lost":
            return emit(state, "", Note(kind=command.status, subject=alloc.id,
                                        message=alloc.reason, node=alloc.node))
        case "running":
            if command.was == "healthy":
                return emit(state, "", Note(kind="unhealthy", subject=alloc.id,
                                            message=alloc.reason, node=alloc.node))
            return state
        case _:
            return state


def _retires(deploy: Deploy, alloc: Allocation) -> bool:
    change = deploy.change(alloc.service)
    return deploy.committed and change is not None and change.action != "unchanged"
