"""Sources: the repositories that the cluster follows."""

from __future__ import annotations

import re

import msgspec
from starlette.responses import Response

from reconciler.api import replies
from reconciler.api.bodies import decode_json
from reconciler.api.calls import Asked, Call, Query, format_duration, parse_duration_ms
from reconciler.api.services import Backend
from reconciler.api.types import Removed, SourceAnswer, SourceBody, SourceList, SourceRow
from reconciler.errors import NotFound, Unprocessable
from reconciler.fsm.records import Source
from reconciler.fsm.state import State
from reconciler.git.location import (
    check_branch,
    check_may_carry_credentials,
    parse_location,
    path_parts,
)

MIN_POLL_MS = 1_000
MAX_CLAIMS = 1_000
"""Names of services, hosts and variables: as many as a manifest may have services."""
MAX_CLAIM_CHARS = 4_096
_NAME = re.compile(r"(?=.{1,40}\Z)[a-z]([a-z0-9]|-[a-z0-9])*", re.ASCII)
"""Rule 2 of the language."""


def source_row(source: Source, backend: Backend) -> SourceRow:
    """A source as the API shows it."""
    return SourceRow(
        name=source.name, url=source.url, branch=source.branch, path=source.path,
        poll=format_duration(source.poll_ms), secret_ref=source.secret_ref,
        services=source.services, hosts=source.hosts, variables=dict(source.variables),
        status=source.status, reason=source.reason,
        since=replies.rfc3339_or_none(source.since_ms), head=source.head,
        applied=source.applied,
        next_poll=replies.rfc3339_or_none(backend.sources.next_poll_ms(source.name)),
    )


async def list_sources(asked: Asked) -> Response:
    """All sources by name."""
    state = await asked.confirmed()
    rows = tuple(source_row(state.sources[name], asked.backend) for name in sorted(state.sources))
    return replies.json(SourceList(
        index=state.index, sources=rows, stale=replies.stale(asked)
    ))


async def show_source(asked: Asked) -> Response:
    """One source."""
    return _shown(asked, await asked.confirmed(), asked.path("name"))


async def add_source(asked: Asked) -> Response:
    """Follow a repository from now on; its first look is at once."""
    body = decode_json(asked.request.headers, asked.body, SourceBody)
    source = _checked(asked.state, body)
    await asked.backend.sources.add(source)
    return _shown(asked, asked.state, source.name, status=201)


async def sync_source(asked: Asked) -> Response:
    """Look now."""
    name = _known(asked.state, asked.path("name")).name
    await asked.backend.sources.sync(
        name, allow_empty=asked.flag("allow_empty"), retry=asked.flag("retry")
    )
    return _shown(asked, asked.state, name, status=202)


async def remove_source(asked: Asked) -> Response:
    """Follow it no more."""
    name = _known(asked.state, asked.path("name")).name
    await asked.backend.sources.remove(name, prune=asked.flag("prune"))
    return replies.json(Removed(index=asked.state.index, name=name))


def _checked(state: State, body: SourceBody) -> Source:
    if not _NAME.fullmatch(body.name):
        raise Unprocessable(f"not the name of a source: {body.name[:60]!r}",
                            hint="lower case letters, digits and single '-', at most 40, "
                                 "first a letter")
    poll_ms = parse_duration_ms(body.poll)
    if poll_ms is None or poll_ms < MIN_POLL_MS:
        raise Unprocessable(f"poll cannot be {body.poll[:40]!r}",
                            hint="a duration such as 10s, from 1s to 30d")
    location = parse_location(body.url)
    path_parts(body.path)
    if body.secret_ref:
        if body.secret_ref not in state.secrets:
            raise Unprocessable(f"no secret {body.secret_ref[:128]}",
                                hint=f"mill secret set {body.secret_ref[:128]}")
        check_may_carry_credentials(location)
    claims = (*body.services, *body.hosts, *body.variables, *body.variables.values())
    if len(claims) > MAX_CLAIMS or any(len(claim) > MAX_CLAIM_CHARS for claim in claims):
        raise Unprocessable("too many or too long services, hosts or variables",
                            hint=f"at most {MAX_CLAIMS} of {MAX_CLAIM_CHARS} characters")
    return Source(
        name=body.name, url=body.url, branch=check_branch(body.branch), path=body.path,
        poll_ms=poll_ms, secret_ref=body.secret_ref, services=tuple(sorted(set(body.services))),
        hosts=tuple(sorted({host.lower() for host in body.hosts})),
        variables=tuple(sorted(body.variables.items())),
    )


def _known(state: State, name: str) -> Source:
    source = state.sources.get(name)
    if source is None:
        raise NotFound(f"no source {name}", hint="list them with: mill git list")
    return source


def _shown(asked: Asked, state: State, name: str, status: int = 200) -> Response:
    row = source_row(_known(state, name), asked.backend)
    return replies.json(
        SourceAnswer(**msgspec.structs.asdict(row), index=state.index, stale=replies.stale(asked)),
        status,
    )


CALLS = (
    Call("GET", "/v1/sources", list_sources, "Sources by name", role="read", serve="read",
         answer=SourceList),
    Call("POST", "/v1/sources", add_source, "Follow a repository", role="admin", serve="lead",
         answer=SourceAnswer, status=201, body=SourceBody),
    Call("GET", "/v1/sources/{name}", show_source, "One source", role="read", serve="read",
         answer=SourceAnswer),
    Call("DELETE", "/v1/sources/{name}", remove_source, "Follow it no more", role="admin",
         serve="lead", answer=Removed,
         query=(Query("prune", "remove its services too", "flag"),)),
    Call("POST", "/v1/sources/{name}/sync", sync_source, "Look now", role="deploy",
         serve="lead", answer=SourceAnswer, status=202,
         query=(Query("allow_empty", "even where that removes every service", "flag"),
                Query("retry", "even a version that rolled back", "flag"))),
)
