"""Bodies on their way in: read within a bound, then manifests or JSON out of bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TypeVar

import msgspec
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from reconciler.api.calls import MAX_BODY_BYTES
from reconciler.api.problems import BodyTooLarge, UnsupportedMediaType
from reconciler.api.types import Files
from reconciler.errors import Malformed, Unprocessable

T = TypeVar("T")

MAX_FILES = 1_000
MAX_FILE_NAME_CHARS = 255
BODY_TIMEOUT_S = 60.0
"""A body that takes longer than this is held back on purpose."""
DEFAULT_FILE = "mill.mill"
"""What positions in a text without a name refer to."""

_MANIFEST_HINT = (
    "send text/plain (one manifest), multipart/form-data (one part a file) "
    'or application/json ({"files": {"NAME": "TEXT"}})'
)


async def read_body(request: Request, max_bytes: int = MAX_BODY_BYTES) -> bytes:
    """The whole body; BodyTooLarge as soon as it is known to pass the bound."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError as error:
        raise Malformed(f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s",
                        hint="send it again") from error
    return bytes(body)


def decode_json(headers: Headers, body: bytes, kind: type[T]) -> T:
    """The body as `kind`: Malformed where it is no JSON, Unprocessable where it does not fit."""
    media, _ = _media_type(headers)
    if body and media and media != "application/json":
        raise UnsupportedMediaType(f"this call does not read {media}", hint="send application/json")
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except msgspec.ValidationError as error:
        # msgspec names the place and the types, never a value: a secret's text stays out.
        raise Unprocessable(f"the body does not fit: {error}",
                            hint="GET /v1/openapi.json describes it") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Malformed(f"the body is not JSON: {_json_trouble(error)}",
                        hint="check it with a JSON parser") from error


async def read_manifest(headers: Headers, body: bytes) -> dict[str, bytes]:
    """The files of a manifest by name, from any of the three kinds of body."""
    media, charset = _media_type(headers)
    if charset not in ("", "utf-8", "utf8", "us-ascii"):
        raise UnsupportedMediaType(f"manifests are UTF-8, not {charset}", hint="convert it first")
    match media:
        case "text/plain":
            files = {DEFAULT_FILE: body}
        case "application/json":
            decoded = decode_json(headers, body, Files)
            files = {name: text.encode() for name, text in decoded.files.items()}
        case "multipart/form-data":
            files = await _multipart(headers, body)
        case _:
            raise UnsupportedMediaType(
                f"a manifest cannot be {media or 'of no type'}", hint=_MANIFEST_HINT
            )
    _check_names(files)
    return files


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is over {max_bytes // (1024 * 1024)} MiB",
                        hint="split what is sent into several")


def _media_type(headers: Headers) -> tuple[str, str]:
    media, *parameters = headers.get("content-type", "").split(";")
    charset = ""
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip().lower() == "charset":
            charset = value.strip().strip('"').lower()
    return media.strip().lower(), charset


def _json_trouble(error: Exception) -> str:
    # A UnicodeDecodeError's own text would quote the bytes.
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


async def _multipart(headers: Headers, body: bytes) -> dict[str, bytes]:
    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    _check_ended(headers, body)
    parser = MultiPartParser(headers, whole(), max_files=MAX_FILES, max_fields=MAX_FILES,
                             max_part_size=MAX_BODY_BYTES)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Malformed(f"the multipart body cannot be read: {error.message}",
                        hint="send one part a file, as curl -F does") from error
    files: dict[str, bytes] = {}
    try:
        for field, part in form.multi_items():
            name = part.filename or field if isinstance(part, UploadFile) else field
            if name in files:
                raise Unprocessable(f"two parts are named {name[:60]!r}",
                                    hint="give each file its own name")
            files[name] = await part.read() if isinstance(part, UploadFile) else part.encode()
    finally:
        await form.close()
    return files


def _check_ended(headers: Headers, body: bytes) -> None:
    """Malformed unless the closing delimiter is there: the parser would drop half a file."""
    _, options = parse_options_header(headers["content-type"])
    delimiter = b"--" + options.get(b"boundary", b"")
    last = body.rfind(delimiter)
    if len(delimiter) == 2 or last < 0 or body[last + len(delimiter):][:2] != b"--":
        raise Malformed("the multipart body has no closing delimiter",
                        hint="send one part a file, as curl -F does")


def _check_names(files: dict[str, bytes]) -> None:
    if not files:
        raise Unprocessable("no files in the body", hint=_MANIFEST_HINT)
    if len(files) > MAX_FILES:
        raise Unprocessable(f"{len(files)} files, over the bound of {MAX_FILES}",
                            hint="put several services into one file")
    for name in files:
        if not name or len(name) > MAX_FILE_NAME_CHARS or not name.isprintable():
            raise Unprocessable(f"not a file name: {name[:60]!r}",
                                hint="printable, 1 to 255 characters")
