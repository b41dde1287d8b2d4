"""One node's API: a request is named by its path, checked, sent on to the leader or answered."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterable
from pathlib import Path

import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from reconciler.api import (
    backup,
    deploys,
    events,
    health,
    logs,
    nodes,
    secrets,
    sources,
    state,
    tokens,
)
from reconciler.api.again import until_taken
from reconciler.api.auth import Known, bearer, check_role, check_time, unknown_token
from reconciler.api.bodies import read_body
from reconciler.api.calls import HEARTBEAT_S, Asked, AskLeader, Call, Site, parse_query
from reconciler.api.forward import HOP, Forwarder
from reconciler.api.listening import MAX_CONNECTIONS, Listening
from reconciler.api.openapi import call_that_describes
from reconciler.api.problems import (
    MethodNotAllowed,
    on_http_exception,
    on_mill_error,
    on_mistake,
    problem_response,
)
from reconciler.api.services import Backend
from reconciler.api.tls import show_instead
from reconciler.errors import MillError
from reconciler.fsm.records import Token

log = structlog.get_logger("mill.api")

STOP_S = 5.0
"""How long answers that are being written get when the node stops; streams end at once."""
KEEP_ALIVE_S = 30
MAX_HEADER_BYTES = 64 * 1024

_WRONG_TOKEN = (401, 403)
"""What a call answers that was asked without a known token, where it is the token's fault."""

_DESCRIBED = (
    *health.CALLS, *deploys.CALLS, *state.CALLS, *events.CALLS, *logs.CALLS, *secrets.CALLS,
    *sources.CALLS, *nodes.CALLS, *tokens.CALLS, *backup.CALLS,
)
CALLS: tuple[Call, ...] = (*_DESCRIBED, call_that_describes(_DESCRIBED))
"""Every call there is. What is not here is 404."""


class Api:
    """The application of one node, and what its requests share."""

    def __init__(self, backend: Backend, heartbeat_s: float = HEARTBEAT_S) -> None:
        self.site = Site(backend, heartbeat_s=heartbeat_s)
        self.forwarder = Forwarder(self.site)
        self.app = Starlette(
            routes=[_Path(self, path, calls).route for path, calls in _by_path(CALLS)],
            middleware=[Middleware(_Guard, site=self.site)],
            exception_handlers={
                MillError: on_mill_error, HTTPException: on_http_exception,
                ClientDisconnect: _on_disconnect,
            },
        )
        self.app.router.redirect_slashes = False

    async def answer(self, call: Call, request: Request) -> Response:
        """One request on one call: role, query, body, then here or at the leader."""
        token: Token | None = request.scope["mill.token"]
        if token is not None:
            check_role(call, token)
        asked = Asked(
            self.site, request, token, parse_query(call, request),
            await read_body(request, call.max_body_bytes),
        )
        if call.serve == "lead":
            return await until_taken(lambda: self._once(asked, call),
                                     alone=HOP not in request.headers)
        return await self._once(asked, call)

    async def _once(self, asked: Asked, call: Call) -> Response:
        token = asked.token
        leads = self.site.backend.ledger.is_leader
        if not leads and (call.serve == "lead" or (token is None and not call.open)):
            return await self._forward(asked, call)
        try:
            return await call.handler(asked)
        except AskLeader:
            return await self._forward(asked, call)
        except MillError as error:
            if token is None and error.status in _WRONG_TOKEN:
                raise self._failed(asked.request) or error from None
            raise

    async def _forward(self, asked: Asked, call: Call) -> Response:
        answer = await self.forwarder.forward(call, asked.request, asked.body)
        if asked.token is None and answer.status_code in _WRONG_TOKEN:
            refused = self._failed(asked.request)
            if refused is not None:
                raise refused
        return answer

    def _failed(self, request: Request) -> MillError | None:
        """Another wrong token came from there; what to say instead where there were too many."""
        host = _caller(request)
        refused = self.site.failures.exhausted(host)
        self.site.failures.count(host)
        return refused


class _Path:
    """All methods of one path, so that any other method is told which there are."""

    def __init__(self, api: Api, path: str, calls: dict[str, Call]) -> None:
        self._api = api
        self._calls = calls
        self.route = Route(path, self.dispatch, methods=None)
        self.route.methods = set()  # none: every method comes here

    async def dispatch(self, request: Request) -> Response:
        call = self._calls.get(request.method)
        if call is None:
            raise MethodNotAllowed(request.method, request.url.path, tuple(sorted(self._calls)))
        try:
            return await self._api.answer(call, request)
        except (MillError, ClientDisconnect):
            raise
        except Exception as error:  # noqa: BLE001 - the edge: on_mistake logs it
            return on_mistake(request, error)


class _Guard:
    """Finds the token before anything else is told, the paths that exist included.

    A follower may not have heard of a new token yet: it lets the request go to the leader.
    """

    def __init__(self, app: ASGIApp, site: Site) -> None:
        self._app = app
        self._site = site
        self._known = Known(site.backend.cluster_key)
        self._open = {call.path for call in CALLS if call.open}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope["mill.token"] = self._token(Request(scope))
        except MillError as error:
            await problem_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _token(self, request: Request) -> Token | None:
        if request.url.path in self._open:
            return None
        sent = bearer(request.headers)
        backend = self._site.backend
        ledger = backend.ledger
        token = self._known.find(ledger.state.tokens.values(), sent)
        if token is None:
            host = _caller(request)
            refused = self._site.failures.exhausted(host)
            if refused is not None:
                raise refused
            reachable = ledger.leader not in (None, backend.node)
            if ledger.is_leader or not reachable or HOP in request.headers:
                error = unknown_token(ledger.state)
                if error.status in _WRONG_TOKEN:
                    self._site.failures.count(host)
                raise error
        else:
            check_time(token, backend.clock.wall_ms())
        return token


class Server:
    """The API on its sockets, from `start` to `stop`. Signals are the node's own business."""

    def __init__(self, backend: Backend, heartbeat_s: float = HEARTBEAT_S) -> None:
        self.api = Api(backend, heartbeat_s)
        self._running: dict[asyncio.Task[None], Listening] = {}
        self._tls: ssl.SSLContext | None = None

    async def start(
        self, *, sockets: list[socket.socket] | None = None, host: str = "127.0.0.1",
        port: int = 0, tls: ssl.SSLContext | None = None,
        plain: list[socket.socket] | None = None,
    ) -> int:
        """Serve on `sockets`, or on a new one; the first one's port. OSError where it is taken.

        `tls` guards those; `plain` are more of them, without it: for loopback.
        """
        listening = sockets or [_listen(host, port)]
        self._tls = tls
        try:
            await self._serve(listening, tls)
            if plain:
                await self._serve(plain, None)
        except BaseException:
            await self.stop()
            raise
        bound: int = listening[0].getsockname()[1]
        return bound

    def take_certificate(self, cert: Path, key: Path) -> None:
        """Show these PEM files to whoever connects from now on; nothing where there is no TLS.

        Raises ssl.SSLError or OSError where they are no pair; what was shown is shown still.
        """
        if self._tls is not None:
            show_instead(self._tls, cert, key)

    async def wait(self) -> None:
        """Until it has stopped, or one of its sockets has."""
        assert self._running, "started first"
        ended, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()

    async def stop(self) -> None:
        """End streams, let answers finish for a moment, close everything."""
        self.api.site.closing.set()
        for server in self._running.values():
            server.leave()
        if self._running:
            await asyncio.wait(self._running)
        await self.api.forwarder.close()

    async def _serve(self, sockets: list[socket.socket], tls: ssl.SSLContext | None) -> None:
        for sock in sockets:
            # Accepted sockets inherit it. asyncio sets it itself only where the socket was made
            # with its protocol named; else each answer waits 40 ms for a delayed ACK.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        config = uvicorn.Config(
            self.api.app, http="h11", ws="none", lifespan="off", loop="asyncio",
            access_log=False, log_config=None, server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=round(STOP_S),
            limit_concurrency=MAX_CONNECTIONS, h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            ssl_context_factory=(lambda _config, _default: tls) if tls is not None else None,
        )
        server = Listening(config)
        task = asyncio.create_task(server.serve(sockets=sockets), name="api")
        self._running[task] = server
        ready = asyncio.create_task(server.ready.wait())
        await asyncio.wait({ready, task}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if task.done():
            task.result()


def _caller(request: Request) -> str:
    return request.client.host if request.client is not None else ""


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)


def _by_path(calls: Iterable[Call]) -> list[tuple[str, dict[str, Call]]]:
    paths: dict[str, dict[str, Call]] = {}
    for call in calls:
        methods = paths.setdefault(call.path, {})
        assert call.method not in methods, f"{call.method} {call.path} twice"
        methods[call.method] = call
    return list(paths.items())


def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=400)  # to nobody: the caller is gone
