"""From a follower to the leader: the same request, its answer, and its streams, in one hop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator

import httpx
import structlog
from starlette.requests import Request
from starlette.responses import Response

from reconciler.api.address import base_url
from reconciler.api.calls import Call, Site
from reconciler.api.problems import NoLeader
from reconciler.api.replies import EVENT_STREAM, Streamed
from reconciler.api.stream import kept_open
from reconciler.api.tls import client_context

log = structlog.get_logger("mill.api")

HOP = "mill-forwarded"
"""Names the node that forwarded; a request that has it is never sent on again."""
CONNECT_S = 2.0
READ_ANSWER_S = 10.0
"""A read is a barrier of at most 5 s and a look at the state."""
WRITE_ANSWER_S = 660.0
"""A scale, restart or rollback waits up to ten minutes for its turn before it is told."""
STREAM_SILENCE_S = 60.0
"""Four missed comments: the leader is gone."""
DEPOSED_S = 3.0
"""Whom another has replaced for so long, and who has not answered, will not: it sleeps."""
LOOK_S = 0.5
CUT_OFF = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 3),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 6_000),
)
"""A leader behind a cut cable says nothing, not even that: after six seconds its streams and
answers are given up (tcp(7); seconds, but the last in milliseconds)."""
MAX_CONNECTIONS = 1_000
MAX_IDLE_CONNECTIONS = 16
"""httpcore walks all connections once for each idle one, at every request."""
IDLE_CONNECTION_S = 2.0
"""Shorter than a server keeps idle ones, so that none is used just as it closes."""
MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""Above the largest list there can be; what a broken peer may make this node hold."""

_HOP_BY_HOP = frozenset({  # RFC 9110, section 7.6.1, and what this hop sets anew
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection",
    "te", "trailer", "transfer-encoding", "upgrade", "host", "content-length", "expect",
    "date", "server",
})


class Forwarder:
    """Carries requests to whoever leads. One a server; close it with the server."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._client = httpx.AsyncClient(
            trust_env=False,
            # Reading has deadlines of its own below: waiting for an answer is not silence.
            timeout=httpx.Timeout(STREAM_SILENCE_S, connect=CONNECT_S, read=None),
            transport=httpx.AsyncHTTPTransport(
                verify=client_context(site.backend.ca), trust_env=False, socket_options=CUT_OFF,
                limits=httpx.Limits(
                    max_connections=MAX_CONNECTIONS,
                    max_keepalive_connections=MAX_IDLE_CONNECTIONS,
                    keepalive_expiry=IDLE_CONNECTION_S,
                ),
            ),
        )

    async def close(self) -> None:
        """Let go of all connections."""
        await self._client.aclose()

    async def forward(self, call: Call, request: Request, body: bytes) -> Response:
        """The leader's answer. NoLeader where there is none, or it cannot be reached."""
        base = self._leader_url(request)
        target = base.copy_with(raw_path=_raw_target(request))
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP]
        headers.append((HOP, self._site.backend.node))
        upstream = self._client.build_request(call.method, target, headers=headers, content=body)
        deadline_s = READ_ANSWER_S if call.serve == "read" else WRITE_ANSWER_S
        try:
            async with asyncio.timeout(deadline_s):
                answer = await self._answer(upstream)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise NoLeader("the leader cannot be reached; nothing happened",
                           hint="try again in a moment") from error
        except (httpx.HTTPError, TimeoutError) as error:
            raise _open_outcome(call) from error
        return await self._relay(call, answer)

    async def _answer(self, upstream: httpx.Request) -> httpx.Response:
        """Of the leader; TimeoutError where it was replaced meanwhile and says nothing."""
        asked = self._site.backend.ledger.leader
        sending = asyncio.ensure_future(self._client.send(upstream, stream=True))
        left_s = DEPOSED_S
        try:
            while not (await asyncio.wait({sending}, timeout=LOOK_S))[0]:
                left_s = DEPOSED_S if self._site.backend.ledger.leader in (None, asked) \
                    else left_s - LOOK_S
                if left_s <= 0:
                    raise TimeoutError
            return await sending
        finally:
            sending.cancel()

    def _leader_url(self, request: Request) -> httpx.URL:
        backend = self._site.backend
        leader = backend.ledger.leader
        if HOP in request.headers or leader is None or leader == backend.node:
            closed = backend.health.log_error(backend.node)
            if closed:
                raise NoLeader(f"the log of this node is closed: {closed}",
                               hint="ask another node; this one comes back by itself")
            # A node that was told it leads and does not, or not yet: an election is under way.
            raise NoLeader("no leader right now", hint="try again in a second")
        node = backend.ledger.state.nodes.get(leader)
        if node is None:
            raise NoLeader(f"the address of the leader, {leader}, is not known here yet",
                           hint="try again in a second")
        return httpx.URL(base_url(node.api))

    async def _relay(self, call: Call, answer: httpx.Response) -> Response:
        headers = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP_BY_HOP}
        if answer.headers.get("content-type", "").startswith(EVENT_STREAM):
            # The leader's own comments keep this one open; adding more could split an event.
            frames = kept_open(_raw(answer), self._site.closing, None)
            return Streamed(frames, answer.status_code, headers, release=answer.aclose)
        body = bytearray()
        try:
            async with asyncio.timeout(READ_ANSWER_S):
                async for chunk in answer.aiter_raw():
                    body += chunk
                    if len(body) > MAX_ANSWER_BYTES:
                        raise NoLeader("the leader's answer is over every bound",
                                       hint="ask for less", unwritten=False)
        except (httpx.HTTPError, TimeoutError) as error:
            raise _open_outcome(call) from error
        finally:
            await answer.aclose()
        return Response(bytes(body), answer.status_code, headers)


def _raw_target(request: Request) -> bytes:
    path: bytes = request.scope["raw_path"]
    query: bytes = request.scope["query_string"]
    return path + b"?" + query if query else path


def _open_outcome(call: Call) -> NoLeader:
    if call.method == "GET":
        return NoLeader("the leader stopped answering", hint="try again in a moment")
    return NoLeader(
        "the leader stopped answering; it may or may not have happened",
        hint="look before you repeat it, or repeat it with the same Idempotency-Key",
        unwritten=False,
    )


async def _raw(answer: httpx.Response) -> AsyncGenerator[bytes, None]:
    pieces = answer.aiter_raw()
    try:
        while True:
            async with asyncio.timeout(STREAM_SILENCE_S):
                piece = await anext(pieces, None)
            if piece is None:
                return
            yield piece
    except (httpx.HTTPError, TimeoutError) as error:
        # The stream just ends: its reader asks again after the last id, any node will do.
        log.warning("forwarded_stream_broke", error=type(error).__name__)
    finally:
        await answer.aclose()
