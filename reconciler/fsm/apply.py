"""apply: one switch from a command to the function that carries it out.

Total and pure: the same entries give the same state on every node. A command whose assumption no
longer holds is refused and changes nothing but the index.
"""

from __future__ import annotations

from typing import assert_never

import msgspec

from reconciler.fsm import commands as c
from reconciler.fsm.apply_allocations import retire_alloc, schedule_alloc, set_alloc_status
from reconciler.fsm.apply_cluster import (
    delete_secret,
    init_cluster,
    set_secret,
    trim,
)
from reconciler.fsm.apply_deploys import (
    begin_pulls,
    commit_deploy,
    end_rollback,
    finish_deploy,
    finish_pulls,
    pass_service,
    record_pull,
    roll_back_deploy,
    route_deploy,
    start_deploy,
    store_spec,
    warn_deploy,
)
from reconciler.fsm.apply_nodes import (
    drain_node,
    join_node,
    register_node,
    remove_node,
    set_node_status,
    undrain_node,
)
from reconciler.fsm.apply_restore import restore_state
from reconciler.fsm.apply_sources import observe_source, put_source, remove_source
from reconciler.fsm.apply_tokens import create_token, revoke_token, set_authority
from reconciler.fsm.codec import Entry
from reconciler.fsm.records import Request
from reconciler.fsm.state import State
from reconciler.fsm.step import Refused, Repeated, put

__all__ = ["Refused", "Repeated", "apply"]


KEPT_REQUESTS = 4_096
"""The newest of those that name themselves: a caller repeats soon, not after thousands."""


def apply(state: State, index: int, entry: Entry) -> tuple[State, Refused | Repeated | None]:
    """The state after `entry` at `index`, and why it changed nothing, if so.

    Logged time never goes back, whatever the leaders' clocks said.
    """
    now = msgspec.structs.replace(
        state, index=index, time_ms=max(state.time_ms, entry.at_ms)
    )
    request = entry.command.request
    if request and request in state.requests:
        return now, Repeated(state.requests[request].index)
    after = _dispatch(now, entry.command)
    if isinstance(after, Refused):
        return now, after
    return _remember(after, entry.command) if request else after, None


def _remember(state: State, command: c.AnyCommand) -> State:
    version = 0
    if isinstance(command, c.SetSecret):
        version = state.secrets[command.name].versions[-1].version
    requests = put(state.requests, command.request, Request(state.index, state.time_ms, version))
    if len(requests) > KEPT_REQUESTS:
        del requests[next(iter(requests))]  # in the order in which they came, also in a snapshot
    return msgspec.structs.replace(state, requests=requests)


def _dispatch(state: State, command: c.AnyCommand) -> State | Refused:
    match command:
        case c.InitCluster():
            return init_cluster(state, command)
        case c.RegisterNode():
            return register_node(state, command)
        case c.SetNodeStatus():
            return set_node_status(state, command)
        case c.SetSecret():
            return set_secret(state, command)
        case c.DeleteSecret():
            return delete_secret(state, command)
        case c.StoreSpec():
            return store_spec(state, command)
        case c.StartDeploy():
            return start_deploy(state, command)
        case c.BeginPulls():
            return begin_pulls(state, command)
        case c.ScheduleAlloc():
            return schedule_alloc(state, command)
        case c.RecordPull():
            return record_pull(state, command)
        case c.FinishPulls():
            return finish_pulls(state, command)
        case c.SetAllocStatus():
            return set_alloc_status(state, command)
        case c.RetireAlloc():
            return retire_alloc(state, command)
        case c.PassService():
            return pass_service(state, command)
        case c.CommitDeploy():
            return commit_deploy(state, command)
        case c.RouteDeploy():
            return route_deploy(state, command)
        case c.FinishDeploy():
            return finish_deploy(state, command)
        case c.RollBackDeploy():
            return roll_back_deploy(state, command)
        case c.EndRollback():
            return end_rollback(state, command)
        case c.WarnDeploy():
            return warn_deploy(state, command)
        case c.PutSource():
            return put_source(state, command)
        case c.ObserveSource():
            return observe_source(state, command)
        case c.RemoveSource():
            return remove_source(state, command)
        case c.Trim():
            return trim(state, command)
        case c.RestoreState():
            return restore_state(state, command)
        case c.JoinNode():
            return join_node(state, command)
        case c.RemoveNode():
            return remove_node(state, command)
        case c.DrainNode():
            return drain_node(state, command)
        case c.UndrainNode():
            return undrain_node(state, command)
        case c.CreateToken():
            return create_token(state, command)
        case c.RevokeToken():
            return revoke_token(state, command)
        case c.SetAuthority():
            return set_authority(state, command)
        case _:
            assert_never(command)
