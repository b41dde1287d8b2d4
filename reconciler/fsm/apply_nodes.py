"""Commands on nodes: they come, go down, come back, are drained, and leave."""

from __future__ import annotations

import re

from msgspec.structs import replace

from reconciler.fsm import commands as c
from reconciler.fsm.apply_allocations import end_alloc
from reconciler.fsm.apply_tokens import join_refusal, spend
from reconciler.fsm.events import Note
from reconciler.fsm.records import Node
from reconciler.fsm.state import State
from reconciler.fsm.step import Refused, emit, put, without

NUMBERS = range(1, 254)
"""What a node's number may be: it is the third part of its /24."""
SHOWN = 3
"""So many allocations are named in a refusal."""
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)
"""RFC 1123's label: it is a name in certificates and in DNS."""
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


def register_node(state: State, command: c.RegisterNode) -> State | Refused:
    """Add a node, or take its new addresses and capacity. Numbers are never shared."""
    for node in state.nodes.values():
        if node.number == command.number and node.name != command.name:
            return Refused(f"number {command.number} belongs to {node.name}")
    known = state.nodes.get(command.name)
    if known is None:
        node = Node(
            name=command.name, number=command.number, api=command.api, agent=command.agent,
            cpu_milli=command.cpu_milli, memory_bytes=command.memory_bytes,
            voter=command.voter, since_ms=state.time_ms, log=command.log,
        )
        return emit(_put(state, node), "",
                    Note(kind="node_joined", subject=node.name, node=node.name))
    return _put(state, replace(
        known, number=command.number, api=command.api, agent=command.agent,
        cpu_milli=command.cpu_milli, memory_bytes=command.memory_bytes, voter=command.voter,
        log=command.log or known.log,
    ))


def join_node(state: State, command: c.JoinNode) -> State | Refused:
    """A machine comes in with a join token, and is down until it is first heard.

    A machine asks again where it did not hear the answer: with the key that the name was given
    to, it is the same node, whose addresses may be new, and nothing is spent.
    """
    if not _NAME.fullmatch(command.name):
        return Refused(f"not the name of a node: {command.name[:70]!r}",
                       "small letters, digits and '-' within, at most 63")
    if not _SHA256.fullmatch(command.key_sha256):
        return Refused("the key's digest is not a SHA-256")
    known = state.nodes.get(command.name)
    if known is not None and known.key_sha256 != command.key_sha256:
        return Refused(f"the name {known.name} is taken by another machine",
                       "join under another name with --name, or, if that machine is gone: "
                       f"mill remove {known.name}")
    refused = join_refusal(state, command.token, command.key_sha256, spends=known is None) \
        or _collision(state, command)
    if refused is not None:
        return refused
    if known is not None:
        return _put(state, replace(
            known, api=command.api, agent=command.agent, log=command.log,
            cpu_milli=command.cpu_milli, memory_bytes=command.memory_bytes))
    taken = {node.number for node in state.nodes.values()}
    number = next((number for number in NUMBERS if number not in taken), None)
    if number is None:
        return Refused(f"the cluster has {len(state.nodes)} nodes already, which is the most",
                       "remove one that is gone with: mill remove NODE")
    node = Node(
        name=command.name, number=number, api=command.api, agent=command.agent, log=command.log,
        cpu_milli=command.cpu_milli, memory_bytes=command.memory_bytes, status="down",
        since_ms=state.time_ms, key_sha256=command.key_sha256,
    )
    state = _put(spend(state, command.token, command.key_sha256), node)
    return emit(state, "", Note(kind="node_joined", subject=node.name, node=node.name,
                                message=f"with token {command.token}"))


def _collision(state: State, command: c.JoinNode) -> Refused | None:
    """Two nodes at one address, or two names of one key, would be taken for each other."""
    for node in state.nodes.values():
        if node.name == command.name:
            continue
        if node.key_sha256 == command.key_sha256:
            return Refused(f"this machine joined as {node.name} already",
                           f"go on under that name, or: mill remove {node.name}")
        for address, held in ((command.api, node.api), (command.agent, node.agent),
                              (command.log, node.log)):
            if address and address == held:
                return Refused(f"{address} is an address of {node.name}",
                               "give another with --advertise, or, if that node is gone: "
                               f"mill remove {node.name}")
    return None


def set_node_status(state: State, command: c.SetNodeStatus) -> State | Refused:
    """A node that goes down loses its allocations in the same entry; one that comes back is
    draining still, if it was."""
    node = state.nodes.get(command.name)
    if node is None:
        return Refused(f"no node {command.name}")
    if command.status == "draining":
        return Refused(f"{command.name} is drained by DrainNode alone")
    status = "draining" if node.draining and command.status == "ready" else command.status
    if node.status == status:
        return Refused(f"{command.name} is {status} already")
    node = replace(node, status=status, since_ms=state.time_ms)
    state = _put(state, node)
    if status == "down":
        lost = dict(state.allocations)
        for alloc in state.of_node(node.name):
            lost[alloc.id] = end_alloc(alloc, "lost", state.time_ms, f"{node.name} is down")
        state = replace(state, allocations=lost)
    note = Note(kind=f"node_{status}", subject=node.name, message=command.reason, node=node.name)
    return emit(state, "", note)


def drain_node(state: State, command: c.DrainNode) -> State | Refused:
    """Nothing new comes to it from here on, down or not; who moves the rest is not our matter."""
    node = state.nodes.get(command.name)
    if node is None:
        return Refused(f"no node {command.name}")
    if node.draining:
        return Refused(f"{node.name} is draining already")
    drained = replace(node, draining=True)
    if node.status != "down":
        drained = replace(drained, status="draining", since_ms=state.time_ms)
    return emit(_put(state, drained), "",
                Note(kind="node_draining", subject=node.name, node=node.name))


def undrain_node(state: State, command: c.UndrainNode) -> State | Refused:
    """It takes allocations again, once it is up."""
    node = state.nodes.get(command.name)
    if node is None:
        return Refused(f"no node {command.name}")
    if not node.draining:
        return Refused(f"{node.name} is not draining")
    back = replace(node, draining=False)
    if node.status == "draining":
        back = replace(back, status="ready", since_ms=state.time_ms)
    return emit(_put(state, back), "",
                Note(kind="node_undrained", subject=node.name, node=node.name))


def remove_node(state: State, command: c.RemoveNode) -> State | Refused:
    """Forget it; its number is free again, since nothing of it is left on the network."""
    if command.name not in state.nodes:
        return Refused(f"no node {command.name}")
    held = [alloc.id for alloc in state.of_node(command.name)]
    if held:
        more = f" and {len(held) - SHOWN} more" if len(held) > SHOWN else ""
        return Refused(f"{command.name} still has {', '.join(held[:SHOWN])}{more}",
                       f"move them away first with: mill drain {command.name}")
    deploy = state.running_deploy()
    if deploy is not None and not deploy.committed and any(
            slot.node == command.name for change in deploy.changes for slot in change.slots):
        return Refused(f"{deploy.id} is about to start something on {command.name}",
                       "wait until it has ended, or cancel it")
    if len(state.nodes) == 1:
        return Refused(f"{command.name} is the last node of the cluster")
    state = replace(state, nodes=without(state.nodes, command.name))
    return emit(state, "", Note(kind="node_removed", subject=command.name, node=command.name))


def _put(state: State, node: Node) -> State:
    return replace(state, nodes=put(state.nodes, node.name, node))
