"""Image references, hosts and route paths: the names by which a service meets the world."""

from __future__ import annotations

import re

from reconciler.language.ledger import Cursor
from reconciler.language.problems import quoted
from reconciler.language.syntax import Value
from reconciler.language.values import Unfit, text

# github.com/distribution/reference, with the registry's host optional.
_IMAGE = re.compile(
    r"(?:(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
    r"(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?/)?"
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)
_MAX_IMAGE_CHARS = 512
_HOST_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_ROUTE_PATH = re.compile(r"/[A-Za-z0-9._~!$&'()+,;=:@%/-]*")
_HEALTH_PATH = re.compile(r"/[!-~]*")


def image(cursor: Cursor, value: Value) -> str:
    """`NAME[:TAG][@DIGEST]`, as written."""
    found = text(cursor, value)
    if len(found) <= _MAX_IMAGE_CHARS and _IMAGE.fullmatch(found):
        return found
    hint = "write NAME:TAG, such as registry.example.com/web:v1"
    if "://" in found:
        hint = "leave the scheme out: REGISTRY/NAME:TAG"
    elif found != found.lower() and _IMAGE.fullmatch(found.lower()):
        hint = "the name of an image is lower case"
    raise Unfit(value.start, f"must be an image reference, not {quoted(found)}", hint)


def host(written: str) -> tuple[str, str]:
    """(the host in lower case, "") or ("", what is wrong): a name, `*.` and a name, or `*`."""
    found = written.lower()
    if found == "*":
        return found, ""
    if "://" in found or "/" in found:
        return "", "leave out the scheme and the path"
    if re.search(r":[0-9]*$", found):
        return "", "leave out the port: routes answer on the ingress ports"
    labels = found.removeprefix("*.").split(".")
    if len(found) > 253 or not all(map(_HOST_LABEL.fullmatch, labels)):
        return "", 'write "app.example.com", "*.example.com" or "*"'
    return found, ""


def route_path(cursor: Cursor, value: Value) -> str:
    """A prefix of whole segments; `/api/` says the same as `/api`."""
    found = text(cursor, value)
    if not found.startswith("/"):
        raise Unfit(value.start, f"must begin with `/`: {quoted(found)}")
    if "*" in found:
        raise Unfit(value.start, f"must not hold `*`: {quoted(found)}",
                    "`/api` already matches `/api` and everything below it")
    if not _ROUTE_PATH.fullmatch(found) or len(found) > 1024:
        raise Unfit(value.start, f"must be a plain path: {quoted(found)}",
                    "no query, fragment or blank; write other characters as %XX")
    if "//" in found or {".", ".."} & set(found.split("/")):
        raise Unfit(value.start, f"must not hold `//`, `.` or `..` segments: {quoted(found)}")
    return found.rstrip("/") or "/"


def health_path(cursor: Cursor, value: Value) -> str:
    """What a probe asks for, a query included."""
    found = text(cursor, value)
    if not found.startswith("/"):
        raise Unfit(value.start, f"must begin with `/`: {quoted(found)}")
    if not _HEALTH_PATH.fullmatch(found) or "#" in found or len(found) > 1024:
        raise Unfit(value.start, f"must be printable ASCII without blanks: {quoted(found)}")
    return found
