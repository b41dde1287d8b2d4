"""A call of the API as a value: routes, role checks and openapi.json are all made of these."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal, assert_never

from starlette.requests import Request
from starlette.responses import Response

from reconciler.api.limits import Failures
from reconciler.api.services import Backend
from reconciler.errors import MillError, NotFound, Unprocessable
from reconciler.fsm.records import Token
from reconciler.fsm.state import State

Role = Literal["read", "deploy", "admin"]
Serve = Literal["lead", "read", "here"]
"""Who answers: the leader (writes), the leader after a barrier (reads; or anyone with
`?stale=ok`), or whichever node was asked."""

HEARTBEAT_S = 15.0
"""How often a silent stream gets a comment line (contracts: The deploy stream)."""

MAX_BODY_BYTES = 2 * 1024 * 1024
"""All texts of a manifest together (mill-language.md, rule 8), and so of most bodies."""
MAX_INDEX = 10**18
"""No log is longer."""

_UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
MAX_DURATION_MS = 30 * _UNITS_MS["d"]


class BadQuery(Unprocessable):
    """A query parameter that this call does not have, or with a value that it cannot take."""


class AskLeader(MillError):
    """Raised in a follower by a handler that finds that only the leader can answer."""

    status = 503


@dataclass(frozen=True)
class Query:
    """A query parameter. `values`: the only texts allowed. `low` and `high` bound an integer."""

    name: str
    about: str
    kind: Literal["flag", "text", "integer", "duration", "list"] = "text"
    values: tuple[str, ...] = ()
    low: int = 0
    high: int = 0


STALE = Query("stale", "answer from what this node knows, without a majority", values=("ok",))


@dataclass(frozen=True)
class Site:
    """What all requests of one server share. `closing` ends its streams, `failures` counts the
    wrong tokens that it was sent.

    `costly` lets one backup be sealed or opened at a time: each takes a core and 64 MiB.
    """

    backend: Backend
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    heartbeat_s: float = HEARTBEAT_S
    costly: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    failures: Failures = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "failures", Failures(self.backend.clock))


@dataclass(frozen=True)
class Asked:
    """One request, checked as far as its call's description reaches."""

    site: Site
    request: Request
    token: Token | None
    query: dict[str, object]
    body: bytes

    @property
    def backend(self) -> Backend:
        """The node's parts."""
        return self.site.backend

    @property
    def state(self) -> State:
        """The newest state here; on the leader for writes, or where the answer streams."""
        return self.backend.ledger.state

    @property
    def token_id(self) -> str:
        """The token's id, for the record of a deploy."""
        return self.token.id if self.token else ""

    @property
    def stale(self) -> bool:
        """The caller is content with what this node knows."""
        return self.query.get("stale") == "ok"

    def path(self, name: str) -> str:
        """A piece of the path."""
        return str(self.request.path_params[name])

    def flag(self, name: str) -> bool:
        """A flag of the query; absent is false."""
        return self.query.get(name) is True

    def text(self, name: str) -> str:
        """A text of the query; absent is empty."""
        value = self.query.get(name, "")
        assert isinstance(value, str)
        return value

    def integer(self, name: str, default: int) -> int:
        """An integer or a duration in ms of the query."""
        value = self.query.get(name, default)
        assert isinstance(value, int)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """All values of a parameter that may repeat."""
        value = self.query.get(name, ())
        assert isinstance(value, tuple)
        return value

    async def confirmed(self) -> State:
        """The state after a linearizable barrier, or as it is here with `?stale=ok`.

        Raises AskLeader on a follower, NoMajority where the leader cannot confirm itself.
        """
        ledger = self.backend.ledger
        if self.stale:
            return ledger.state
        if not ledger.is_leader:
            raise AskLeader("this node does not lead")
        return await ledger.read()


Handler = Callable[[Asked], Awaitable[Response]]


@dataclass(frozen=True)
class Call:
    """A method on a path. `answer` is the struct of its JSON, `streams` the struct of `data:`.

    A token that is bound to services may only ask calls of role `read` and those that are `scoped`:
    these look themselves whether it reaches. `problems`: statuses that only this call answers with.
    `download` and `upload` are the media types of an answer or a body of bytes; `headers` what it
    reads beside the common ones, each with what it is for.
    """

    method: Literal["GET", "POST", "PUT", "DELETE"]
    path: str
    handler: Handler
    about: str
    role: Role
    serve: Serve
    answer: type | None = None
    status: int = 200
    streams: str = ""
    body: type | None = None
    manifest: bool = False
    query: tuple[Query, ...] = ()
    open: bool = False
    download: str = ""
    upload: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    max_body_bytes: int = MAX_BODY_BYTES
    scoped: bool = False
    problems: tuple[int, ...] = ()

    @property
    def queries(self) -> tuple[Query, ...]:
        """All its parameters: reads take `stale` too."""
        return (*self.query, STALE) if self.serve == "read" else self.query


def parse_query(call: Call, request: Request) -> dict[str, object]:
    """Every parameter, checked; BadQuery names the first that cannot be taken."""
    known = {query.name: query for query in call.queries}
    values: dict[str, object] = {}
    for name in dict.fromkeys(key for key, _ in request.query_params.multi_items()):
        if name == "at" and name not in known:
            raise NotFound("there is no ?at= on this call", hint="/v1/status has it")
        if name not in known:
            raise BadQuery(f"no parameter {name!r}", hint=_known(call))
        query = known[name]
        texts = request.query_params.getlist(name)
        if query.kind == "list":
            values[name] = tuple(texts)
        elif len(texts) > 1:
            raise BadQuery(f"parameter {name} is given {len(texts)} times", hint="give it once")
        else:
            values[name] = _value(query, texts[0])
    return values


def parse_duration_ms(text: str) -> int | None:
    """Milliseconds of `500ms`, `5m` or `1h30m`, 1 ms to 30 d; None where it is none."""
    if len(text) > 40 or not re.fullmatch(r"(\d+(ms|s|m|h|d))+", text, re.ASCII):
        return None
    pieces = re.findall(r"(\d+)(ms|s|m|h|d)", text, re.ASCII)
    total = sum(int(number) * _UNITS_MS[unit] for number, unit in pieces)
    return total if 0 < total <= MAX_DURATION_MS else None


def format_duration(ms: int) -> str:
    """The shortest text that `parse_duration_ms` reads back."""
    for unit in ("d", "h", "m", "s"):
        if ms % _UNITS_MS[unit] == 0:
            return f"{ms // _UNITS_MS[unit]}{unit}"
    return f"{ms}ms"


def _known(call: Call) -> str:
    names = ", ".join(query.name for query in call.queries)
    return f"this call takes {names}" if names else "this call takes no parameters"


def _value(query: Query, text: str) -> object:
    if query.values and text not in query.values:
        raise BadQuery(f"{query.name} cannot be {text[:40]!r}",
                       hint=f"one of {', '.join(query.values)}")
    match query.kind:
        case "flag":
            return _flag(query, text)
        case "integer":
            if not re.fullmatch(r"\d{1,18}", text, re.ASCII) \
                    or not query.low <= int(text) <= query.high:
                raise BadQuery(f"{query.name} cannot be {text[:40]!r}",
                               hint=f"a whole number from {query.low} to {query.high}")
            return int(text)
        case "duration":
            duration = parse_duration_ms(text)
            if duration is None:
                raise BadQuery(f"{query.name} cannot be {text[:40]!r}",
                               hint="a duration such as 30s, 5m or 1h30m, at most 30d")
            return duration
        case "text" | "list":
            return text
        case _:
            assert_never(query.kind)


def _flag(query: Query, text: str) -> bool:
    if text not in ("true", "false", "1", "0"):
        raise BadQuery(f"{query.name} cannot be {text[:40]!r}", hint="true or false")
    return text in ("true", "1")
