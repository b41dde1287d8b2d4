"""Tokens: made here, shown once, kept as hashes; those that nodes join with too."""

from __future__ import annotations

import base64
import hashlib
import re
import ssl

from msgspec import UNSET
from starlette.responses import Response

from reconciler.api import replies
from reconciler.api.bodies import decode_json
from reconciler.api.calls import MAX_DURATION_MS, Asked, Call, parse_duration_ms
from reconciler.api.idempotency import done_before, request_of
from reconciler.api.join_token import JoinToken, format_join_token
from reconciler.api.services import Joining
from reconciler.api.types import Removed, TokenBody, TokenList, TokenMade, TokenRow
from reconciler.errors import Conflict, NotFound, Unavailable, Unprocessable
from reconciler.fsm.apply_tokens import MAX_USES
from reconciler.fsm.commands import CreateToken, RevokeToken
from reconciler.fsm.records import Token

SECRET_BYTES = 32
ID_BYTES = 5
"""Eight letters and digits: enough to tell a thousand tokens apart, few enough to type."""
PREFIX = "mill_"
"""So that whoever finds one, a scanner of repositories too, sees what it is."""
MAX_SERVICES = 100
_SERVICE = re.compile(r"(?=.{1,40}\Z)[a-z]([a-z0-9]|-[a-z0-9])*", re.ASCII)
"""Rule 2 of the language."""
JOIN_MS = 3_600_000
"""Join tokens live for an hour where no other time is asked for."""


async def create_token(asked: Asked) -> Response:
    """A new token; this answer is the only place where it is ever shown."""
    body = decode_json(asked.request.headers, asked.body, TokenBody)
    if body.join:
        return await _create_join(asked, body)
    if body.role is None:
        raise Unprocessable("the token has no role", hint="role: admin, deploy or read; or join")
    if body.uses is not None:
        raise Unprocessable("uses are for join tokens", hint="leave uses out, or set join")
    if body.services and body.role != "deploy":
        raise Unprocessable(f"a token of role {body.role} is not bound to services",
                            hint="services are for tokens of role deploy")
    secret = PREFIX + _text(asked, SECRET_BYTES)
    token = Token(
        id=_new_id(asked), sha256=_sha256(secret), role=body.role, services=_services(body),
        expires_ms=_end(asked, body.expires, 0),
    )
    return await _made(asked, token, secret)


async def _create_join(asked: Asked, body: TokenBody) -> Response:
    if body.role is not None or body.services:
        raise Unprocessable("a join token has no role and no services",
                            hint="it lets machines in, and does nothing else")
    uses = 1 if body.uses is None else body.uses
    if not 1 <= uses <= MAX_USES:
        raise Unprocessable(f"uses cannot be {uses}", hint=f"1 to {MAX_USES}")
    here = asked.state.nodes.get(asked.backend.node)
    if here is None:
        raise Unavailable("this node does not know its own address yet", hint="try again")
    secret = _text(asked, SECRET_BYTES)
    token = Token(id=_new_id(asked), sha256=_sha256(secret), role="join", uses=uses,
                  expires_ms=_end(asked, body.expires, JOIN_MS))
    text = format_join_token(JoinToken(
        address=here.api.partition("://")[2] or here.api,
        fingerprint=_fingerprint(joining(asked).ca_pem), id=token.id, secret=secret))
    return await _made(asked, token, text)


async def list_tokens(asked: Asked) -> Response:
    """All tokens, by age; none of their texts is known to anybody here."""
    state = await asked.confirmed()
    rows = sorted(state.tokens.values(), key=_age)
    return replies.json(TokenList(
        index=state.index, tokens=tuple(map(_row, rows)), stale=replies.stale(asked)))


async def revoke_token(asked: Asked) -> Response:
    """Good no more, from this answer on."""
    name = asked.path("id")
    if name not in asked.state.tokens:
        raise NotFound(f"no token {name[:64]}", hint="list them with: mill token list")
    index = await asked.backend.ledger.propose(RevokeToken(name))
    return replies.json(Removed(index=index, name=name))


def joining(asked: Asked) -> Joining:
    """The part that lets machines in; Unavailable where this node has none."""
    part = asked.backend.joining
    if part is None:
        raise Unavailable("machines cannot join through this node",
                          hint="a cluster that mill init founded takes machines in")
    return part


async def _made(asked: Asked, token: Token, text: str) -> Response:
    request = request_of(asked)
    done = done_before(asked, request)
    if done is not None:
        raise Conflict(f"this request made a token before, at index {done.index}",
                       hint="its text was in that answer alone: mill token list names it; revoke "
                            "it, and make another under another key")
    index = await asked.backend.ledger.propose(CreateToken(token, request=request))
    return replies.json(TokenMade(
        index=index, id=token.id, token=text, role=token.role, services=token.services,
        uses=token.uses if token.role == "join" else UNSET,
        expires_at=replies.rfc3339_or_none(token.expires_ms),
    ), 201)


def _row(token: Token) -> TokenRow:
    return TokenRow(
        id=token.id, role=token.role, services=token.services,
        created_at=replies.rfc3339_or_none(token.at_ms), uses=token.uses, used=len(token.joined),
        expires_at=replies.rfc3339_or_none(token.expires_ms),
    )


def _services(body: TokenBody) -> tuple[str, ...]:
    """Names of services, of which some may not be there yet."""
    names = tuple(sorted(set(body.services)))
    if len(names) > MAX_SERVICES:
        raise Unprocessable(f"{len(names)} services", hint=f"at most {MAX_SERVICES}")
    for name in names:
        if not _SERVICE.fullmatch(name):
            raise Unprocessable(f"not the name of a service: {name[:60]!r}",
                                hint="as it stands in the manifest")
    return names


def _end(asked: Asked, expires: str, default_ms: int) -> int:
    """When it ends, in ms since the epoch; 0 for never."""
    lasts_ms = parse_duration_ms(expires) if expires else default_ms
    if lasts_ms is None:
        raise Unprocessable(f"expires cannot be {expires[:40]!r}",
                            hint="a duration such as 1h or 30d, at most "
                                 f"{MAX_DURATION_MS // 86_400_000}d")
    return asked.backend.clock.wall_ms() + lasts_ms if lasts_ms else 0


def _fingerprint(ca_pem: bytes) -> str:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(ca_pem.decode("ascii"))).hexdigest()


def _text(asked: Asked, count: int) -> str:
    return base64.urlsafe_b64encode(asked.backend.random_bytes(count)).rstrip(b"=").decode()


def _new_id(asked: Asked) -> str:
    return "t-" + base64.b32encode(asked.backend.random_bytes(ID_BYTES)).decode().lower()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _age(token: Token) -> tuple[int, str]:
    return token.at_ms, token.id


CALLS = (
    Call("GET", "/v1/tokens", list_tokens, "Tokens, without their texts", role="admin",
         serve="read", answer=TokenList),
    Call("POST", "/v1/tokens", create_token, "Make a token, or with `join` one for machines",
         role="admin", serve="lead", answer=TokenMade, status=201, body=TokenBody),
    Call("DELETE", "/v1/tokens/{id}", revoke_token, "Revoke a token", role="admin", serve="lead",
         answer=Removed),
)
