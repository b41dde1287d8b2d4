"""What is to move off the draining nodes: a pure look at the state, the same for every leader.

A slot that two live allocations fill is in the middle of a move: `pairs` says which of them stays
and which goes. What stands on a draining node without such a partner is `stranded`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from reconciler.executor.heal import find_room
from reconciler.fsm.records import ENDED, Allocation
from reconciler.fsm.state import State
from reconciler.plan.place import Shortage


@dataclass(frozen=True, slots=True)
class Pair:
    """`goes` retires once `stays` serves."""

    stays: Allocation
    goes: Allocation


def draining(state: State) -> frozenset[str]:
    """The nodes that are to be emptied, down or not."""
    return frozenset(node.name for node in state.nodes.values() if node.draining)


def in_deploy(state: State) -> frozenset[str]:
    """Services that the running deploy changes: nothing of them moves until it has ended."""
    deploy = state.running_deploy()
    return frozenset(
        change.service for change in (deploy.changes if deploy else ())
        if change.action != "unchanged")


def pairs(state: State) -> list[Pair]:
    """The moves under way, those of a node that drains no more too, by service and slot."""
    leaving = draining(state)
    return [
        Pair(stays, goes)
        for holders in _by_slot(state).values() if len(holders) > 1
        for stays in (_stays(holders, leaving),)
        for goes in holders if goes.id != stays.id
    ]


def stranded(state: State) -> list[Allocation]:
    """Of each service the first allocation that has to move, by service; none of one that has a
    move under way already, or is being deployed."""
    leaving, busy = draining(state), in_deploy(state)
    first: dict[str, Allocation] = {}
    for (service, _), holders in _by_slot(state).items():
        if service in busy:
            continue
        if len(holders) > 1:
            busy |= {service}
            first.pop(service, None)
        elif holders[0].node in leaving:
            first.setdefault(service, holders[0])
    return list(first.values())


def room_for(state: State, alloc: Allocation) -> str | Shortage:
    """The node that takes its replacement, or what is short."""
    ready = {node.name for node in state.nodes.values()
             if node.status == "ready" and not node.draining}
    return find_room(state, alloc.service, alloc.cpu_milli, alloc.memory_bytes, alloc.digest,
                     ready)


def overdue(state: State, pair: Pair, now_ms: int) -> bool:
    """The replacement had its time to become healthy, and is not."""
    spec = state.spec_for(pair.stays)
    deadline_ms = spec.health.deadline_ms if spec else 0
    return pair.stays.status != "healthy" and now_ms - pair.stays.scheduled_ms > deadline_ms


def may_go(state: State, pair: Pair, now_ms: int) -> bool:
    """Whether `goes` is no loss, though `stays` is not healthy: it serves nobody either, and is
    the one too many, or has waited for long enough."""
    if pair.goes.status == "healthy":
        return False
    return pair.goes.node not in draining(state) or overdue(state, pair, now_ms)


def _stays(holders: Iterable[Allocation], leaving: frozenset[str]) -> Allocation:
    """Off the draining nodes first, then what serves, then what was there before."""
    return min(holders, key=lambda a: (a.node in leaving, a.status != "healthy", a.scheduled_ms,
                                       a.id))


def _by_slot(state: State) -> dict[tuple[str, int], list[Allocation]]:
    held: dict[tuple[str, int], list[Allocation]] = {}
    for alloc in state.allocations.values():
        if alloc.live and alloc.status not in ENDED and alloc.status != "stopping":
            held.setdefault((alloc.service, alloc.slot), []).append(alloc)
    return {key: sorted(held[key], key=lambda a: a.id) for key in sorted(held)}
