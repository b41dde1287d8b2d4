"""One node's API: a request is named by its path, checked, sent on to the leader or answered."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator, Iterable

import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from reconciler.api import backup, deploys, events, health, logs, secrets, sources, state
from reconciler.api.auth import bearer, check_role, find_token, unknown_token
from reconciler.api.bodies import read_body
from reconciler.api.calls import HEARTBEAT_S, Asked, AskLeader, Call, Site, parse_query
from reconciler.api.forward import HOP, Forwarder
from reconciler.api.openapi import call_that_describes
from reconciler.api.problems import (
    MethodNotAllowed,
    on_http_exception,
    on_mill_error,
    on_mistake,
    problem_response,
)
from reconciler.api.services import Backend
from reconciler.errors import MillError
from reconciler.fsm.records import Token

log = structlog.get_logger("mill.api")

STOP_S = 5.0
"""How long answers that are being written get when the node stops; streams end at once."""
KEEP_ALIVE_S = 30
MAX_CONNECTIONS = 4_096
"""Streams included; a node has a few thousand files to open."""
MAX_HEADER_BYTES = 64 * 1024

_DESCRIBED = (
    *health.CALLS, *deploys.CALLS, *state.CALLS, *events.CALLS, *logs.CALLS, *secrets.CALLS,
    *sources.CALLS, *backup.CALLS,
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
        leads = self.site.backend.ledger.is_leader
        if not leads and (call.serve == "lead" or (token is None and not call.open)):
            return await self.forwarder.forward(call, request, asked.body)
        try:
            return await call.handler(asked)
        except AskLeader:
            return await self.forwarder.forward(call, request, asked.body)


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
        ledger = self._site.backend.ledger
        token = find_token(ledger.state.tokens.values(), sent)
        if token is None:
            reachable = ledger.leader not in (None, self._site.backend.node)
            if ledger.is_leader or not reachable or HOP in request.headers:
                raise unknown_token(ledger.state)
        return token


class Server:
    """The API on its sockets, from `start` to `stop`. Signals are the node's own business."""

    def __init__(self, backend: Backend, heartbeat_s: float = HEARTBEAT_S) -> None:
        self.api = Api(backend, heartbeat_s)
        self._uvicorn: _Uvicorn | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(
        self, *, sockets: list[socket.socket] | None = None, host: str = "127.0.0.1", port: int = 0
    ) -> int:
        """Serve on `sockets`, or on a new one; the first one's port. OSError where it is taken."""
        listening = sockets or [_listen(host, port)]
        for sock in listening:
            # Accepted sockets inherit it. asyncio sets it itself only where the socket was made
            # with its protocol named; else each answer waits 40 ms for a delayed ACK.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        config = uvicorn.Config(
            self.api.app, http="h11", ws="none", lifespan="off", loop="asyncio",
            access_log=False, log_config=None, server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=round(STOP_S),
            limit_concurrency=MAX_CONNECTIONS, h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        )
        self._uvicorn = _Uvicorn(config)
        self._task = asyncio.create_task(self._uvicorn.serve(sockets=listening), name="api")
        ready = asyncio.create_task(self._uvicorn.ready.wait())
        await asyncio.wait({ready, self._task}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self._task.done():
            self._task.result()
        bound: int = listening[0].getsockname()[1]
        return bound

    async def wait(self) -> None:
        """Until it has stopped."""
        assert self._task is not None, "started first"
        await self._task

    async def stop(self) -> None:
        """End streams, let answers finish for a moment, close everything."""
        self.api.site.closing.set()
        if self._uvicorn is not None and self._task is not None:
            self._uvicorn.leave()
            await asyncio.wait({self._task})
        await self.api.forwarder.close()


class _Uvicorn(uvicorn.Server):
    """uvicorn that leaves signals alone, says when it accepts connections, and stops when told."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()
        self._leaving = asyncio.Event()

    def leave(self) -> None:
        self.should_exit = True
        self._leaving.set()

    async def main_loop(self) -> None:
        # A tick of ten refreshes the Date header; uvicorn's own loop wakes ten times as often.
        ticks = 0
        while not await self.on_tick(ticks):
            ticks += 10
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._leaving.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


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
