"""Who may ask what: bearer tokens (RFC 6750), of which the cluster keeps hashes alone."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers

from reconciler.api.calls import Call, Role
from reconciler.api.local_token import TOKEN_ID, local_token
from reconciler.api.problems import Forbidden, Unauthorized
from reconciler.errors import Unavailable
from reconciler.fsm.records import Token
from reconciler.fsm.state import State

_REACH: dict[Role, int] = {"read": 0, "deploy": 1, "admin": 2}
_CHALLENGE = 'Bearer realm="mill"'
_INVALID = _CHALLENGE + ', error="invalid_token"'


def bearer(headers: Headers) -> str:
    """The token as it was sent; Unauthorized where there is none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise Unauthorized("no bearer token", challenge=_CHALLENGE)
    return token


class Known:
    """Tokens that callers may have: those of the log, and root's on every node."""

    def __init__(self, cluster_key: bytes) -> None:
        self._root = Token(id=TOKEN_ID, sha256=_digest(local_token(cluster_key)))

    def find(self, tokens: Iterable[Token], sent: str) -> Token | None:
        """The token that was sent, found in a time that does not tell how near a guess came.

        What machines join with is no token of the API.
        """
        digest = _digest(sent)
        found = self._root if hmac.compare_digest(self._root.sha256, digest) else None
        for token in tokens:
            if hmac.compare_digest(token.sha256, digest) and token.role != "join":
                found = token
        return found


def check_time(token: Token, now_ms: int) -> None:
    """Unauthorized where the token has ended."""
    if 0 < token.expires_ms <= now_ms:
        raise Unauthorized("this token has expired", challenge=_INVALID)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def unknown_token(state: State) -> Unauthorized | Unavailable:
    """Why a token is not taken: it is none, or this node has not heard of any cluster yet."""
    if not state.cluster:
        return Unavailable("this node does not know its cluster yet", hint="try again in a moment")
    return Unauthorized("this token is not one of this cluster's", challenge=_INVALID)


def check_role(call: Call, token: Token) -> None:
    """Forbidden where the token's role does not reach the call, or where the token is bound to
    services and the call is about more."""
    if token.services and call.role != "read" and not call.scoped:
        raise Forbidden(f"a token that is bound to services may not {call.method} {call.path}",
                        hint=f"it is for {', '.join(token.services)}")
    if token.role == "join" or _REACH[token.role] < _REACH[call.role]:
        raise Forbidden(
            f"a token of role {token.role} may not {call.method} {call.path}",
            hint=f"use a token of role {call.role}",
        )
