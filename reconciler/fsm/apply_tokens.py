"""Commands on tokens and on the authority: who may speak to the cluster, and who may join it."""

from __future__ import annotations

import re

from msgspec.structs import replace

from reconciler.fsm import commands as c
from reconciler.fsm.events import Note
from reconciler.fsm.records import Token
from reconciler.fsm.state import State
from reconciler.fsm.step import Refused, emit, put, without

MAX_TOKENS = 1_000
"""Each request looks at all of them."""
MAX_USES = 253
"""More nodes than that no cluster has."""
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


def create_token(state: State, command: c.CreateToken) -> State | Refused:
    """Good from now on. Its time is the log's, and nobody has joined with it."""
    token = replace(command.token, at_ms=state.time_ms, joined=())
    refused = _unfit(state, token)
    if refused is not None:
        return refused
    state = replace(state, tokens=put(state.tokens, token.id, token))
    return emit(state, "", Note(kind="token_created", subject=token.id, message=_reach(token)))


def _unfit(state: State, token: Token) -> Refused | None:
    if not token.id or token.id in state.tokens:
        return Refused(f"a token {token.id!r} exists already", "try again: ids are drawn")
    if not _SHA256.fullmatch(token.sha256) \
            or any(other.sha256 == token.sha256 for other in state.tokens.values()):
        return Refused("the token's digest is none, or another token's")
    if len(state.tokens) >= MAX_TOKENS:
        return Refused(f"the cluster has {MAX_TOKENS} tokens, which is the most",
                       "revoke one with: mill token revoke ID")
    if token.services and token.role != "deploy":
        return Refused(f"a token of role {token.role} is not bound to services",
                       "services are for tokens of role deploy")
    if token.role == "join" and not (1 <= token.uses <= MAX_USES and token.expires_ms):
        return Refused("a join token has 1 to 253 uses, and an end")
    if token.expires_ms and token.expires_ms <= state.time_ms:
        return Refused("the token would be expired already",
                       "look at the clocks of your machines")
    return None


def _reach(token: Token) -> str:
    """What it is good for, as an event tells it."""
    match token.role:
        case "join":
            return f"join, for {token.uses} node{'s' * (token.uses != 1)}"
        case "deploy" if token.services:
            return f"deploy, for {', '.join(token.services)}"
        case _:
            return token.role


def revoke_token(state: State, command: c.RevokeToken) -> State | Refused:
    """Good no more. One admin token that never ends stays, or nobody could make another."""
    token = state.tokens.get(command.id)
    if token is None:
        return Refused(f"no token {command.id}")
    lasting = [t.id for t in state.tokens.values() if t.role == "admin" and not t.expires_ms]
    if lasting == [token.id]:
        return Refused(f"{token.id} is the last admin token that does not expire",
                       "create another first with: mill token create --role admin")
    state = replace(state, tokens=without(state.tokens, token.id))
    return emit(state, "", Note(kind="token_revoked", subject=token.id, message=token.role))


def set_authority(state: State, command: c.SetAuthority) -> State | Refused:
    """Once only: certificates out there are this one's."""
    if state.authority is not None:
        return Refused("the cluster has its authority already")
    return replace(state, authority=command.authority)


def join_refusal(
    state: State, token_id: str, key_sha256: str, *, spends: bool
) -> Refused | None:
    """Why this token does not let a node in at the state's time, or None where it does.

    `spends`: the node is a new one. Else the join is repeated, for which a token is good that
    has a use left, or that this very key has used.
    """
    token = state.tokens.get(token_id)
    if token is None or token.role != "join":
        return Refused("there is no such join token: it was revoked, or never was",
                       "make one with: mill token create --join")
    if token.expires_ms <= state.time_ms:
        return Refused("the join token has expired", "make one with: mill token create --join")
    if len(token.joined) >= token.uses and (spends or key_sha256 not in token.joined):
        return Refused(f"the join token is spent: {len(token.joined)} of {token.uses} uses",
                       "make one with: mill token create --join --uses N")
    return None


def spend(state: State, token_id: str, key_sha256: str) -> State:
    """One use less; `join_refusal` was asked before."""
    token = state.tokens[token_id]
    spent = replace(token, joined=(*token.joined, key_sha256))
    return replace(state, tokens=put(state.tokens, token.id, spent))


def expired_tokens(state: State, before_ms: int) -> list[str]:
    """Ids of tokens that ended before that."""
    return [t.id for t in state.tokens.values() if 0 < t.expires_ms < before_ms]
