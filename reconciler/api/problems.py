"""Errors on their way out: every MillError kind becomes `application/problem+json` (RFC 9457)."""

from __future__ import annotations

import re
import traceback
from http import HTTPStatus

import msgspec
import structlog
from msgspec import UNSET
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from reconciler.api.limits import TooManyRequests
from reconciler.api.types import ManifestError, Problem
from reconciler.errors import MillError, NotFound, Unavailable
from reconciler.language.problems import InvalidManifest

log = structlog.get_logger("mill.api")

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1
"""An election takes about a second: so long until it is worth asking again."""


class Unauthorized(MillError):
    """No token, or one that this cluster does not know: 401 with a challenge (RFC 6750)."""

    status = 401

    def __init__(self, what: str, *, challenge: str) -> None:
        super().__init__(what, hint="send Authorization: Bearer TOKEN with a token of this cluster")
        self.challenge = challenge


class Forbidden(MillError):
    """The token is known, but its role does not reach this far: 403."""

    status = 403


class MethodNotAllowed(MillError):
    """The path exists with other methods (`allow`): 405."""

    status = 405

    def __init__(self, method: str, path: str, allow: tuple[str, ...]) -> None:
        super().__init__(f"{path} has no {method}", hint=f"it takes {', '.join(allow)}")
        self.allow = allow


class BodyTooLarge(MillError):
    """More than the bound; nothing was kept: 413."""

    status = 413


class UnsupportedMediaType(MillError):
    """A body of a kind that this call does not read: 415."""

    status = 415


class NoLeader(Unavailable):
    """Nobody is known to lead, or who does cannot be reached: 503. Nothing was written, but where
    it stopped answering."""

    def __init__(self, what: str, *, at: str = "", hint: str = "", unwritten: bool = True) -> None:
        super().__init__(what, at=at, hint=hint)
        self.unwritten = unwritten


def problem_of(error: MillError) -> Problem:
    """The body for an error; its type is named after its class."""
    errors = error.problems if isinstance(error, InvalidManifest) else None
    return Problem(
        type="urn:mill:problem:" + _kebab(type(error).__name__),
        title=HTTPStatus(error.status).phrase,
        status=error.status,
        detail=error.what,
        hint=error.hint,
        at=error.at or UNSET,
        errors=UNSET if errors is None else tuple(
            ManifestError(p.file, p.line, p.column, p.message, p.hint) for p in errors
        ),
    )


def problem_response(error: MillError) -> Response:
    """The answer for an error, with the headers that its status calls for."""
    headers = {}
    match error:
        case Unauthorized():
            headers["www-authenticate"] = error.challenge
        case TooManyRequests():
            headers["retry-after"] = str(error.retry_after_s)
        case MethodNotAllowed():
            headers["allow"] = ", ".join(error.allow)
        case _ if error.status == HTTPStatus.UNAUTHORIZED:
            headers["www-authenticate"] = 'Bearer realm="mill"'  # RFC 9110, section 15.5.2
        case _ if error.status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers["retry-after"] = str(RETRY_AFTER_S)
        case _:
            pass
    return Response(
        msgspec.json.encode(problem_of(error)), error.status, headers, media_type=MEDIA_TYPE
    )


def on_mill_error(_request: Request, error: Exception) -> Response:
    """A refusal, told."""
    assert isinstance(error, MillError)
    return problem_response(error)


def on_http_exception(request: Request, error: Exception) -> Response:
    """What the router itself refuses: a path that nobody serves."""
    assert isinstance(error, HTTPException)
    return problem_response(
        NotFound(f"nothing at {request.url.path}", hint="GET /v1/openapi.json lists every call")
    )


def on_mistake(request: Request, error: Exception) -> Response:
    """A mistake of ours: logged without any value of the request, answered without detail."""
    # Frames without locals: a request's values, secrets among them, must not reach the log.
    where = "".join(traceback.format_tb(error.__traceback__)[-8:])
    log.error("request_failed", method=request.method, path=request.url.path,
              error=type(error).__name__, where=where)
    return problem_response(
        MillError("an internal error", hint="look at this node's log for request_failed")
    )


def _kebab(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()
