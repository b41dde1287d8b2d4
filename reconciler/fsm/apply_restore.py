"""Commands that bring a backup's contents into an empty cluster."""

from __future__ import annotations

from msgspec.structs import replace

from reconciler.errors import Unprocessable
from reconciler.fsm import commands as c
from reconciler.fsm.backup import decode_contents, digest
from reconciler.fsm.events import Note
from reconciler.fsm.state import State
from reconciler.fsm.step import Refused, emit, without

MAX_PARTS = 4096
"""Of at most one entry each; bounds what an unfinished restore keeps in every snapshot."""


def why_not_empty(state: State) -> str:
    """What a restore would collide with, or ""."""
    for kind, held in (("service", state.services), ("secret", state.secrets),
                       ("source", state.sources)):
        if held:
            return f"the cluster has the {kind} {min(held)}"
    running = state.running_deploy()
    return f"deploy {running.id} is running" if running else ""


def restore_state(state: State, command: c.RestoreState) -> State | Refused:
    """Keep a piece; the last one takes everything over at once, into an empty cluster alone."""
    occupied = why_not_empty(state)
    if occupied:
        return Refused(f"{occupied}: a backup is restored into an empty one",
                       "found a new cluster, and restore before anything is deployed")
    if not 0 <= command.part < command.parts <= MAX_PARTS:
        return Refused(f"piece {command.part} of {command.parts}")
    held = state.spec_parts.get(command.sha256, ())
    if command.part == 0:
        # Whatever else was begun is given up: pieces of one backup at a time are kept.
        held, state = (), replace(state, spec_parts={})
    elif command.part != len(held):
        return Refused(f"piece {command.part} of the backup is out of order",
                       "another restore may run; try again")
    held = (*held, command.data)
    if len(held) < command.parts:
        return replace(state, spec_parts={command.sha256: held})
    data = b"".join(held)
    if digest(data) != command.sha256:
        return Refused("the pieces of the backup are not what was sent")
    try:
        carried = decode_contents(data)
    except Unprocessable as error:
        return Refused(error.what, error.hint)
    state = replace(
        state, spec_parts=without(state.spec_parts, command.sha256), services=carried.services,
        specs=carried.specs, secrets=carried.secrets, next_vip=carried.next_vip,
        sources={
            name: replace(source, since_ms=state.time_ms)
            for name, source in carried.sources.items()
        },
    )
    return emit(state, "", Note(kind="cluster_restored", subject=carried.cluster,
                                message=f"as it was at index {carried.index}"))
