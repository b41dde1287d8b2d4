"""Whether this node lives, whether it can serve, and what it serves: calls without a token, and
the description of all."""

from __future__ import annotations

from starlette.responses import Response

from reconciler.api import replies
from reconciler.api.calls import Asked, Call
from reconciler.api.problems import NoLeader
from reconciler.api.types import Health, Ready


async def healthz(asked: Asked) -> Response:
    """The process lives and its loop turns."""
    return replies.json(Health("ok", asked.backend.node))


async def readyz(asked: Asked) -> Response:
    """It knows its cluster and who leads it."""
    leader = asked.backend.ledger.leader
    if leader is None or not asked.state.cluster:
        raise NoLeader("no leader is known here", hint="try again in a second")
    return replies.json(Ready("ready", asked.backend.node, leader))


CALLS = (
    Call("GET", "/healthz", healthz, "The process lives", role="read", serve="here",
         answer=Health, open=True),
    Call("GET", "/readyz", readyz, "It can serve: it knows a leader", role="read", serve="here",
         answer=Ready, open=True),
)
