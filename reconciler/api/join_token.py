"""The text of a join token: where the cluster is, how to know it, and the right to come in.

`mill-join.BODY.CHECK`: BODY is base64url (RFC 4648, unpadded) of JSON, CHECK the first 8 hex digits
of its SHA-256, so that a token that lost a piece on its way is told from one that was refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re

import msgspec

from reconciler.errors import Malformed

PREFIX = "mill-join."
MAX_CHARS = 1024
"""A token has about 300."""
_HINT = "copy it whole, on one line, as mill token create --join printed it"


class JoinToken(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a join token says. `address`: a node's API, host:port; `fingerprint`: the hex SHA-256
    of the cluster's CA (DER); `id` and `secret`: of the token in the log."""

    address: str
    fingerprint: str
    id: str
    secret: str

    def __repr__(self) -> str:
        return f"JoinToken(address={self.address!r}, id={self.id!r}, secret=***)"


def format_join_token(token: JoinToken) -> str:
    """The text that a person carries from one machine to another."""
    body = base64.urlsafe_b64encode(msgspec.json.encode(token)).rstrip(b"=").decode()
    return f"{PREFIX}{body}.{_check(body)}"


def parse_join_token(text: str) -> JoinToken:
    """The token of a text; Malformed says what is wrong with it, and never shows it."""
    text = text.strip()
    if not text.startswith(PREFIX):
        raise Malformed("this is not a join token: one begins with mill-join.",
                        hint="make one with: mill token create --join")
    if len(text) > MAX_CHARS:
        raise Malformed(f"a join token of {len(text)} characters", hint=_HINT)
    body, _, check = text.removeprefix(PREFIX).partition(".")
    if not body.isascii() or check != _check(body):
        raise Malformed("the join token is incomplete or was changed on its way", hint=_HINT)
    try:
        data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        token = msgspec.json.decode(data, type=JoinToken)
    except (binascii.Error, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Malformed("the join token cannot be read",
                        hint="is the cluster's mill of another version?") from error
    if not re.fullmatch(r"[0-9a-f]{64}", token.fingerprint) \
            or not (token.address and token.id and token.secret):
        raise Malformed("the join token says too little to join by",
                        hint="make another with: mill token create --join")
    return token


def _check(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:8]
