"""Secrets: sealed before they enter the log, opened for an admin who asks, shown to nobody else."""

from __future__ import annotations

import re

from starlette.responses import Response

from reconciler.api import replies
from reconciler.api.bodies import decode_json
from reconciler.api.calls import Asked, Call
from reconciler.api.idempotency import done_before, request_of
from reconciler.api.types import (
    Removed,
    SecretAnswer,
    SecretBody,
    SecretList,
    SecretName,
    SecretSet,
)
from reconciler.errors import NotFound, Unprocessable
from reconciler.fsm.commands import DeleteSecret, SetSecret
from reconciler.fsm.records import Secret
from reconciler.fsm.seal import NONCE_BYTES, seal, unseal
from reconciler.fsm.state import State

MAX_VALUE_BYTES = 256 * 1024
"""Half of a log entry."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
"""Rule 2 of the language."""


async def list_secrets(asked: Asked) -> Response:
    """Names only."""
    state = await asked.confirmed()
    return replies.json(SecretList(
        index=state.index, secrets=tuple(SecretName(name) for name in sorted(state.secrets)),
        stale=replies.stale(asked),
    ))


async def set_secret(asked: Asked) -> Response:
    """A new version; services take it with their next restart or deploy."""
    name = asked.path("name")
    if not _NAME.fullmatch(name):
        raise Unprocessable(f"not the name of a secret: {name[:60]!r}",
                            hint="letters, digits, '.', '_' and '-', at most 128, "
                                 "first a letter or a digit")
    value = decode_json(asked.request.headers, asked.body, SecretBody).value
    size = len(_utf8(value))
    if size > MAX_VALUE_BYTES:
        raise Unprocessable(f"the value of {name} has {size} bytes",
                            hint=f"at most {MAX_VALUE_BYTES // 1024} KiB")
    backend = asked.backend
    nonce, request = backend.random_bytes(NONCE_BYTES), request_of(asked)
    index = await backend.ledger.propose(
        SetSecret(name, nonce, seal(backend.cluster_key, nonce, name, value), request=request)
    )
    done = done_before(asked, request)
    return replies.json(SecretSet(
        index=index, name=name,
        version=done.version if done else _version_of(asked.state, name, nonce)))


async def get_secret(asked: Asked) -> Response:
    """The newest version in clear, for an admin."""
    state = await asked.confirmed()
    secret = _known(state, asked.path("name"))
    newest = secret.versions[-1]
    value = unseal(asked.backend.cluster_key, newest.nonce, secret.name, newest.sealed)
    return replies.json(SecretAnswer(
        index=state.index, name=secret.name, value=value, version=newest.version,
        stale=replies.stale(asked),
    ))


async def delete_secret(asked: Asked) -> Response:
    """All versions; Conflict names who needs it."""
    name, request = asked.path("name"), request_of(asked)
    done = done_before(asked, request)
    if done is not None:
        return replies.json(Removed(index=done.index, name=name))
    secret = _known(asked.state, name)
    index = await asked.backend.ledger.propose(DeleteSecret(secret.name, request=request))
    return replies.json(Removed(index=index, name=secret.name))


def _version_of(state: State, name: str, nonce: bytes) -> int:
    """The version that this very write became: it may not be the newest by now, so it is known by
    its nonce. 0 where it is gone already: deleted, or overtaken by many."""
    secret = state.secrets.get(name)
    versions = secret.versions if secret else ()
    return next((each.version for each in versions if each.nonce == nonce), 0)


def _known(state: State, name: str) -> Secret:
    secret = state.secrets.get(name)
    if secret is None:
        raise NotFound(f"no secret {name[:128]}", hint="list them with: mill secret list")
    return secret


def _utf8(value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:  # JSON may escape half of a surrogate pair
        raise Unprocessable("the value is not Unicode text",
                            hint="encode binary values, as base64 does") from None


CALLS = (
    Call("GET", "/v1/secrets", list_secrets, "The names of all secrets", role="read",
         serve="read", answer=SecretList),
    Call("PUT", "/v1/secrets/{name}", set_secret, "Set a secret", role="admin", serve="lead",
         answer=SecretSet, body=SecretBody),
    Call("GET", "/v1/secrets/{name}", get_secret, "A secret in clear", role="admin",
         serve="read", answer=SecretAnswer),
    Call("DELETE", "/v1/secrets/{name}", delete_secret, "Forget a secret that nothing needs",
         role="admin", serve="lead", answer=Removed),
)
