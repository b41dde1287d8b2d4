"""`Idempotency-Key`: a write that is asked for again, also of another leader, happens once."""

from __future__ import annotations

from reconciler.api.calls import Asked
from reconciler.errors import Malformed
from reconciler.fsm.records import Request

MAX_KEY_CHARS = 255
"""UUIDs, and whatever CI systems make of run numbers."""


def key_of(asked: Asked) -> str:
    """The caller's key, "" for none; Malformed where it cannot be used."""
    key = asked.request.headers.get("idempotency-key", "")
    if len(key) > MAX_KEY_CHARS or not (key.isascii() and key.isprintable()):
        raise Malformed("the Idempotency-Key cannot be used",
                        hint=f"at most {MAX_KEY_CHARS} printable ASCII characters")
    return key


def request_of(asked: Asked) -> str:
    """The name of this request in the log: a key is its caller's own, and of this call alone."""
    key = key_of(asked)
    request = asked.request
    return f"{asked.token_id} {request.method} {request.url.path} {key}" if key else ""


def done_before(asked: Asked, request: str) -> Request | None:
    """What this very request did when it was asked for before."""
    return asked.state.requests.get(request) if request else None
