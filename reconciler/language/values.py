"""Values of attributes: each reader takes one and gives it typed, in its unit, or says why not."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import assert_never

from reconciler.language.ledger import Cursor
from reconciler.language.problems import Flaw, quoted
from reconciler.language.spec import AddressRef, Part, SecretRef, Template, Text
from reconciler.language.strings import SECRET_NAME, Ref, parts
from reconciler.language.syntax import Bool, Items, Num, Other, Str, Value

Reader = Callable[[Cursor, Value], object]

NAME = re.compile(r"[a-z](?:[a-z0-9]|-[a-z0-9])*")
MAX_NAME_CHARS = 40
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)(|[KMGT]i?)")
_SIZE_LIKE = re.compile(r"([0-9.]+)\s*([kmgtKMGT])(i?)[bB]?")
_DURATION = re.compile(r"[0-9]{1,12}(?:ms|s|m|h|d)")
_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DAYS_30_MS = 30 * 86_400_000


class Unfit(Flaw):
    """A value that does not fit; the message goes on from the attribute's name."""


def text(cursor: Cursor, value: Value) -> str:
    """A string without secrets, its variables and addresses filled in."""
    out = []
    for part in _string_parts(cursor, value):
        if isinstance(part, str):
            out.append(part)
        elif part.kind == "variable":
            out.append(cursor.variable(part.name, part.offset))
        elif part.kind == "secret":
            raise Flaw(part.offset, "a secret may stand in env values and file content only",
                       "where it stood here, logs and plans would show it")
        else:
            out.append(_address(cursor, part))
    return "".join(out)


def template(cursor: Cursor, value: Value) -> Template:
    """A string with its references kept, its variables filled in."""
    out: list[Part] = []
    buffer = ""
    for part in _string_parts(cursor, value):
        if isinstance(part, str):
            buffer += part
        elif part.kind == "variable":
            buffer += cursor.variable(part.name, part.offset)
        else:
            if buffer:
                out.append(Text(buffer))
                buffer = ""
            out.append(_reference(cursor, part))
    if buffer:
        out.append(Text(buffer))
    return tuple(out)


def _reference(cursor: Cursor, part: Ref) -> SecretRef | AddressRef:
    if part.kind == "secret":
        cursor.ledger.secrets.append(cursor.use(part.name, part.offset))
        return SecretRef(part.name)
    _check_service_name(part)
    cursor.ledger.addresses.append(cursor.use(part.name, part.offset))
    return AddressRef(part.name)


def _check_service_name(part: Ref) -> None:
    if not NAME.fullmatch(part.name) or len(part.name) > MAX_NAME_CHARS:
        raise Flaw(part.offset, f"{quoted(part.name)} is not a name of a service",
                   "write ${service.NAME.address}")


def _address(cursor: Cursor, part: Ref) -> str:
    """`NAME.mill:PORT` now: only env and files are filled in when a container starts."""
    _check_service_name(part)
    header = cursor.ledger.headers.get(part.name)
    if header is None:
        if cursor.ledger.unread:
            return ""
        raise Flaw(part.offset, f"no service {quoted(part.name)} in this manifest",
                   "the address of a service of another manifest may stand in env values and "
                   "file content only")
    cursor.ledger.addresses.append(cursor.use(part.name, part.offset))
    return f"{part.name}.mill:{header.port}"


def _string_parts(cursor: Cursor, value: Value) -> list[str | Ref]:
    match value:
        case Str():
            return parts(cursor.source, value)
        case Num():
            raise Unfit(value.start, "must be a string, not a number",
                        f'write it in quotes: "{value.text}"')
        case Bool():
            word = "true" if value.value else "false"
            raise Unfit(value.start, "must be a string, not a bool",
                        f'write it in quotes: "{word}"')
        case Items():
            raise Unfit(value.start, "must be a string, not a list")
        case Other():
            raise _refused(cursor, value, "a string")
        case _:
            assert_never(value)


def _refused(cursor: Cursor, value: Other, wanted: str) -> Flaw:
    written = cursor.source.text[value.start : value.end]
    hint = "values are literals; what a file says is what runs"
    if re.fullmatch(r"secret\([\w.-]+\)|service\.[\w-]+\.address|var\.[\w-]+", written):
        hint = f'write it in a string: "${{{written}}}"'
    elif value.what == "a bare word":
        hint = f'write it in quotes: "{written[:40]}"' if written.isprintable() else ""
    elif value.what == "`null`":
        hint = "leave the attribute out"
    elif value.what.startswith("an object"):
        hint = "write a block: NAME { ... }"
    return Unfit(value.start, f"must be {wanted}, not {value.what}", hint)


def number(cursor: Cursor, value: Value, wanted: str) -> Decimal:
    """A number exactly as written; `wanted` names in a message what it should have been."""
    match value:
        case Num():
            return Decimal(value.text)
        case Str():
            raise Unfit(value.start, f"must be {wanted}, not a string", "write it without quotes")
        case Bool() | Items():
            kind = "a bool" if isinstance(value, Bool) else "a list"
            raise Unfit(value.start, f"must be {wanted}, not {kind}")
        case Other():
            raise _refused(cursor, value, wanted)
        case _:
            assert_never(value)


def integer(low: int, high: int) -> Callable[[Cursor, Value], int]:
    """A whole number from `low` to `high`."""
    wanted = f"a whole number from {low} to {high}"

    def read(cursor: Cursor, value: Value) -> int:
        found = number(cursor, value, wanted)
        if not low <= found <= high or found != found.to_integral_value():
            raise Unfit(value.start, f"must be {wanted}")
        return int(found)

    return read


def cpu(cursor: Cursor, value: Value) -> int:
    """Cores as written to thousandths of a core, 0.01 to 1024."""
    found = number(cursor, value, "a number of cores") * 1000
    if not 10 <= found <= 1_024_000:
        raise Unfit(value.start, "must be from 0.01 to 1024 cores")
    if found != found.to_integral_value():
        raise Unfit(value.start, "has more than three decimals", "cores are counted to 0.001")
    return int(found)


def boolean(cursor: Cursor, value: Value) -> bool:
    """`true` or `false`."""
    if isinstance(value, Bool):
        return value.value
    if isinstance(value, Other):
        raise _refused(cursor, value, "true or false")
    hint = "write it without quotes" if isinstance(value, Str) else ""
    raise Unfit(value.start, "must be true or false", hint)


def one_of(*words: str) -> Reader:
    """One of the words."""

    def read(cursor: Cursor, value: Value) -> str:
        found = text(cursor, value)
        if found not in words:
            listed = ", ".join(f'"{word}"' for word in words[:-1]) + f' or "{words[-1]}"'
            raise Unfit(value.start, f"must be {listed}, not {quoted(found)}",
                        cursor.ledger.near(found, words))
        return found

    return read


def size(low: int, high: int, spoken: str) -> Reader:
    """Bytes from a string such as `512M`, `1.5Gi`, or from a plain number."""

    def read(cursor: Cursor, value: Value) -> int:
        found = Decimal(value.text) if isinstance(value, Num) else _size(cursor, value)
        if not low <= found <= high:
            raise Unfit(value.start, f"must be from {spoken}")
        if found != found.to_integral_value():
            raise Unfit(value.start, "must be a whole number of bytes")
        return int(found)

    return read


def _size(cursor: Cursor, value: Value) -> Decimal:
    written = text(cursor, value)
    found = _SIZE.fullmatch(written)
    if not found:
        like = _SIZE_LIKE.fullmatch(written) if len(written) < 32 else None
        hint = "K M G T are powers of 1000, Ki Mi Gi Ti of 1024"
        if like:
            hint = f'did you mean "{like[1]}{like[2].upper()}{like[3]}"?'
        raise Unfit(value.start, f'must be a size such as "512M" or "1Gi", not {quoted(written)}',
                    hint)
    unit = found[2]
    base = 1024 if unit.endswith("i") else 1000
    power = "KMGT".index(unit[0]) + 1 if unit else 0
    return Decimal(found[1]) * Decimal(base**power)


def duration(cursor: Cursor, value: Value) -> int:
    """Milliseconds from a string such as `500ms` or `1h30m`, 1 ms to 30 d."""
    if isinstance(value, Num):
        raise Unfit(value.start, 'must be a duration such as "10s", not a number',
                    f'write the unit: "{value.text}s"')
    written = text(cursor, value)
    pieces = _DURATION.findall(written)
    if not pieces or "".join(pieces) != written or len(written) > 64:
        hint = f'write the unit: "{written}s"' if re.fullmatch(r"[0-9]{1,12}", written) else (
            "the units are ms, s, m, h and d, of whole numbers")
        raise Unfit(value.start,
                    f'must be a duration such as "10s" or "1h30m", not {quoted(written)}', hint)
    total = sum(int(re.sub(r"\D", "", piece)) * _MS[piece.lstrip("0123456789")]
                for piece in pieces)
    if not 1 <= total <= _DAYS_30_MS:
        raise Unfit(value.start, "must be from 1ms to 30d")
    return total


def strings(cursor: Cursor, value: Value) -> tuple[str, ...]:
    """A list of strings, in its order."""
    return tuple(found for found, _ in items(cursor, value))


def items(cursor: Cursor, value: Value) -> list[tuple[str, Value]]:
    """A list of strings, each with its place."""
    if isinstance(value, Other):
        raise _refused(cursor, value, "a list of strings")
    if not isinstance(value, Items):
        written = cursor.source.text[value.start : value.end]
        hint = f"write [{written}]" if isinstance(value, Str) and len(written) < 40 else ""
        raise Unfit(value.start, 'must be a list of strings, such as ["a", "b"]', hint)
    return [(text(cursor, item), item) for item in value.items]


def matching(pattern: str, wanted: str, hint: str = "") -> Reader:
    """A string of a shape."""
    compiled = re.compile(pattern)

    def read(cursor: Cursor, value: Value) -> str:
        found = text(cursor, value)
        if not compiled.fullmatch(found):
            raise Unfit(value.start, f"must be {wanted}, not {quoted(found)}", hint)
        return found

    return read


def secret_name(cursor: Cursor, value: Value) -> str:
    """The name of a secret, written down as a use of it."""
    found = text(cursor, value)
    if not SECRET_NAME.fullmatch(found):
        raise Unfit(value.start, f"must be the name of a secret, not {quoted(found)}")
    cursor.ledger.secrets.append(cursor.use(found, value.start)._replace(field="registry_auth"))
    return found


def path_error(path: str) -> str:
    """Why a text is no absolute path inside a container; empty if it is one."""
    if not path.startswith("/"):
        return "must begin with `/`"
    if ".." in path.split("/"):
        return "must not hold `..`"
    if len(path) > 4096 or not path.isprintable():
        return "must be printable and at most 4096 characters"
    return ""


def path(cursor: Cursor, value: Value) -> str:
    """An absolute path inside a container, without a slash at its end."""
    found = text(cursor, value)
    if wrong := path_error(found):
        raise Unfit(value.start, f"{wrong}: {quoted(found)}")
    return found.rstrip("/") or "/"


def paths(cursor: Cursor, value: Value) -> tuple[str, ...]:
    """A set of absolute paths, sorted."""
    found: set[str] = set()
    for written, item in items(cursor, value):
        wrong = path_error(written)
        plain = written.rstrip("/")
        if wrong or not plain:
            raise Unfit(item.start, f"{wrong or 'must not be the root'}: {quoted(written)}")
        if plain in found:
            raise Unfit(item.start, f"names {quoted(plain)} twice")
        found.add(plain)
    return tuple(sorted(found))
