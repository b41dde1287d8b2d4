"""Nodes: out of service and back, out of the cluster, and machines that want in."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Literal

import msgspec
from starlette.responses import Response

from reconciler.api import replies
from reconciler.api.bodies import decode_json
from reconciler.api.calls import Asked, Call, Query
from reconciler.api.services import Nodes
from reconciler.api.state import node_row
from reconciler.api.stream import encode
from reconciler.api.tokens import joining
from reconciler.api.types import NodeAnswer, Removed
from reconciler.errors import MillError, NotFound, Unavailable
from reconciler.executor.requests import DrainStep, JoinAnswer, JoinRequest
from reconciler.fsm.records import Node

DRAIN_MS = 600_000
"""The time for a drain where none is asked for (contracts: `mill drain --timeout 10m`)."""
PEM = "application/x-pem-file"
MAX_JOIN_BYTES = 64 * 1024


async def drain(asked: Asked) -> Response:
    """Nothing new comes to it, and what is there moves; told until it is empty or time is up."""
    node = _known(asked)
    steps = _nodes(asked).drain(node.name, asked.integer("timeout", DRAIN_MS))
    first = await anext(aiter(steps))  # whatever is refused is refused before the stream begins
    return replies.events(asked, _frames(first, steps))


async def undrain(asked: Asked) -> Response:
    """It takes allocations again."""
    node = _known(asked)
    await _nodes(asked).undrain(node.name)
    row = node_row(asked.state, node.name, asked.backend)
    return replies.json(NodeAnswer(**msgspec.structs.asdict(row), index=asked.state.index))


async def remove(asked: Asked) -> Response:
    """Forget it; what is still on it stands in the way."""
    node = _known(asked)
    await _nodes(asked).remove(node.name)
    return replies.json(Removed(index=asked.state.index, name=node.name))


async def join_ca(asked: Asked) -> Response:
    """The CA that this cluster's certificates are of: public, and worth nothing by itself."""
    return Response(joining(asked).ca_pem, 200, {"cache-control": "no-store"}, media_type=PEM)


async def join(asked: Asked) -> Response:
    """A machine comes in; the join token in the body is what it is asked by."""
    request = decode_json(asked.request.headers, asked.body, JoinRequest)
    return replies.json(await joining(asked).join(request))


def _known(asked: Asked) -> Node:
    name = asked.path("id")
    node = asked.state.nodes.get(name)
    if node is None:
        raise NotFound(f"no node {name[:64]}", hint="list them with: mill nodes")
    return node


def _nodes(asked: Asked) -> Nodes:
    part = asked.backend.nodes
    if part is None:
        raise Unavailable("this node cannot drain or remove nodes", hint="ask another node")
    return part


async def _frames(
    first: DrainStep, steps: AsyncIterator[DrainStep]
) -> AsyncGenerator[bytes, None]:
    """Exactly one of `done` and `failed` ends it, where it does not just break off."""
    step = first
    try:
        while True:
            yield encode(_kind(step), _data(step))
            if _kind(step) != "progress":
                return
            try:
                step = await anext(steps)
            except StopAsyncIteration:
                return
            except MillError as error:
                if isinstance(error, Unavailable):
                    return  # no longer the leader: the reader asks again, and another goes on
                step = DrainStep(phase="failed", reason=error.what, left=step.left)
    finally:
        if isinstance(steps, AsyncGenerator):
            with contextlib.suppress(MillError):
                await steps.aclose()


def _kind(step: DrainStep) -> Literal["progress", "done", "failed"]:
    match step.phase:
        case "done" | "failed":
            return step.phase
        case _:
            return "progress"


def _data(step: DrainStep) -> dict[str, object]:
    """As a deploy's: what ends it says `success` instead of a phase."""
    fields: dict[str, object] = msgspec.to_builtins(step)
    if _kind(step) != "progress":
        del fields["phase"]
        fields["success"] = step.phase == "done"
    return fields


CALLS = (
    Call("POST", "/v1/nodes/{id}/drain", drain, "Move everything off a node", role="admin",
         serve="lead", streams="drain",
         query=(Query("timeout", "how long it may take, such as 10m", "duration"),)),
    Call("POST", "/v1/nodes/{id}/undrain", undrain, "Let a node take allocations again",
         role="admin", serve="lead", answer=NodeAnswer),
    Call("DELETE", "/v1/nodes/{id}", remove, "Forget a node that has no allocations left",
         role="admin", serve="lead", answer=Removed),
    Call("GET", "/v1/join/ca", join_ca, "The cluster's CA, for machines that join", role="read",
         serve="here", download=PEM, open=True),
    Call("POST", "/v1/join", join, "A machine joins with a join token", role="admin",
         serve="lead", answer=JoinAnswer, body=JoinRequest, open=True,
         max_body_bytes=MAX_JOIN_BYTES, problems=(401, 403, 429)),
)
