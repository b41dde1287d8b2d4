"""The blocks inside a service or task: env, file, health, route, listen, volume."""

from __future__ import annotations

import re

import msgspec

from reconciler.language.addresses import health_path, host, route_path
from reconciler.language.ledger import Claim, Cursor
from reconciler.language.problems import Flaw, quoted
from reconciler.language.schema import Field, Found, Schema, label_text, read_block, read_value
from reconciler.language.spec import EnvVar, FileBlock, HealthKind, Listen, Route, Volume
from reconciler.language.syntax import Attribute, Block, Label, Value
from reconciler.language.values import (
    MAX_NAME_CHARS,
    NAME,
    Unfit,
    boolean,
    duration,
    integer,
    path,
    path_error,
    size,
    strings,
    template,
    text,
)

_ENV_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,255}")
_OURS = frozenset({"MILL_SERVICE", "MILL_ALLOC", "MILL_NODE"})
NAME_HINT = "names are lower-case letters, digits and single `-`, at most 40, a letter first"


def check_name(name: str, label: Label, what: str) -> None:
    """Rule 2: every name is also an address."""
    if not NAME.fullmatch(name) or len(name) > MAX_NAME_CHARS:
        raise Flaw(label.start, f"{quoted(name)} is not a name of {what}", NAME_HINT)


def env(cursor: Cursor, block: Block) -> tuple[EnvVar, ...]:
    """Environment variables, sorted by name."""
    seen: dict[str, int] = {}
    found = []
    for item in block.body:
        try:
            if not isinstance(item, Attribute):
                raise Flaw(item.start, "`env` holds no blocks", 'write NAME = "value"')
            _check_env_key(cursor, item, seen)
            inside = cursor.inside(f"env.{item.name}")
            cursor.mark(f"env.{item.name}", item.start)
            found.append(EnvVar(item.name, read_value(inside, item, template)))
        except Flaw as flaw:
            cursor.flaw(flaw)
    return tuple(sorted(found, key=lambda one: one.key))


def _check_env_key(cursor: Cursor, item: Attribute, seen: dict[str, int]) -> None:
    if not _ENV_KEY.fullmatch(item.name):
        raise Flaw(item.start, f"{quoted(item.name)} is not a name of a variable",
                   "letters, digits, `_` and `-`")
    if item.name in _OURS:
        raise Flaw(item.start, f"`{item.name}` is set by mill itself", "take another name")
    if item.name in seen:
        line = cursor.source.position(seen[item.name])[0]
        raise Flaw(item.start, f"`{item.name}` is already set at line {line}", "keep one of them")
    seen[item.name] = item.start


def _mode(cursor: Cursor, value: Value) -> str:
    written = text(cursor, value)
    if not re.fullmatch(r"0?[0-7]{3}", written):
        raise Unfit(value.start, f"must be three octal digits such as \"0440\", not "
                    f"{quoted(written)}")
    return written.zfill(4)


_FILE = Schema("`file`", {
    "content": Field("content", template, True), "mode": Field("mode", _mode),
})


def file(cursor: Cursor, block: Block) -> FileBlock | None:
    """A file of the container; None where it cannot be read."""
    label = block.labels[0]
    where = label_text(cursor, label)
    if wrong := path_error(where) or ("" if where.rstrip("/") == where else "names a folder"):
        raise Flaw(label.start, f"the path of a file {wrong}: {quoted(where)}",
                   'such as file "/etc/app.toml" { ... }')
    found = _inside(cursor, block, f"file.{where}", _FILE)
    if "content" not in found.values:
        return None
    return msgspec.convert({"path": where, **found.values}, FileBlock)


_THRESHOLD = integer(1, 100)


def _tcp(cursor: Cursor, value: Value) -> bool:
    if not boolean(cursor, value):
        raise Unfit(value.start, "must be true where it is written", "leave it out")
    return True


_HEALTH = Schema("`health`", {
    "path": Field("path", health_path), "tcp": Field("tcp", _tcp),
    "command": Field("command", strings), "interval": Field("interval_ms", duration),
    "timeout": Field("timeout_ms", duration), "deadline": Field("deadline_ms", duration),
    "healthy": Field("healthy", _THRESHOLD), "unhealthy": Field("unhealthy", _THRESHOLD),
})
_WAYS: tuple[tuple[str, HealthKind], ...] = (
    ("path", "http"), ("tcp", "tcp"), ("command", "command"),
)


def health(cursor: Cursor, block: Block) -> Found:
    """What a health block says; the kind of a block that names none depends on the port."""
    found = _inside(cursor, block, "health", _HEALTH)
    ways = [kind for name, kind in _WAYS if found.has(name)]
    if len(ways) > 1:
        raise Flaw(block.start, "`health` takes one of `path`, `tcp` and `command`",
                   "keep one of them")
    if found.values.get("command") == ():
        cursor.flaw(Flaw(found.starts["command"], "`command` of `health` is empty",
                         'such as command = ["/bin/check"]'))
    found.values.pop("tcp", None)
    if ways:
        found.values["kind"] = ways[0]
    return found


_ROUTE = Schema("`route`", {
    "path": Field("path", route_path), "websocket": Field("websocket", boolean),
    "strip_prefix": Field("strip_prefix", boolean), "tls": Field("tls", boolean),
})


def route(cursor: Cursor, block: Block) -> Route:
    """A host and a path prefix, claimed for the service."""
    label = block.labels[0]
    written = label_text(cursor, label)
    where, wrong = host(written)
    if wrong:
        raise Flaw(label.start, f"{quoted(written)} is not a host of a route", wrong)
    found = _inside(cursor, block, f"route.{where}", _ROUTE)
    made = msgspec.convert({"host": where, **found.values}, Route)
    if "path" in found.values or not found.has("path"):
        cursor.mark(f"route.{made.host}{made.path}", block.start)
        cursor.ledger.routes.append(
            Claim(cursor.owner, (made.host, made.path), cursor.place(block.start)))
    return made


_LISTEN = Schema("`listen`", {"port": Field("port", integer(1, 65535), True)})


def listen(cursor: Cursor, block: Block) -> Listen | None:
    """A raw port at the edge, claimed for the service; None where it cannot be read."""
    label = block.labels[0]
    protocol = label_text(cursor, label)
    if protocol not in {"tcp", "udp"}:
        raise Flaw(label.start, f'`listen` takes "tcp" or "udp", not {quoted(protocol)}',
                   'such as listen "tcp" { port = 5432 }')
    found = _inside(cursor, block, f"listen.{protocol}", _LISTEN)
    if "port" not in found.values:
        return None
    made = msgspec.convert({"protocol": protocol, **found.values}, Listen)
    cursor.mark(f"listen.{protocol}:{made.port}", block.start)
    cursor.ledger.listens.append(
        Claim(cursor.owner, (protocol, str(made.port)), cursor.place(block.start)))
    return made


_VOLUME = Schema("`volume`", {
    "path": Field("path", path, True), "ephemeral": Field("ephemeral", boolean),
    "size": Field("size_bytes", size(1_000_000, 1_000 * 1_000**4, "1M to 1000T")),
})


def volume(cursor: Cursor, block: Block) -> Volume | None:
    """A named folder; None where it cannot be read."""
    label = block.labels[0]
    name = label_text(cursor, label)
    check_name(name, label, "a volume")
    found = _inside(cursor, block, f"volume.{name}", _VOLUME)
    ephemeral = found.values.get("ephemeral", False)
    if ephemeral and found.has("size"):
        cursor.flaw(Flaw(found.starts["size"], "an ephemeral volume takes no `size`",
                         "keep one of them"))
    if not found.has("ephemeral") and not found.has("size"):
        cursor.flaw(Flaw(block.start, "`volume` needs `size` or `ephemeral = true`",
                         'add size = "5Gi" to keep the data, or ephemeral = true'))
    elif not ephemeral and not found.has("size") and "ephemeral" in found.values:
        cursor.flaw(Flaw(found.starts["ephemeral"], "a volume that is kept needs `size`",
                         'add size = "5Gi"'))
    if "path" not in found.values:
        return None
    made = msgspec.convert({"name": name, **found.values}, Volume)
    if not made.ephemeral and made.size_bytes:
        cursor.ledger.volumes.append(
            Claim(cursor.owner, (name, str(made.size_bytes)), cursor.place(block.start)))
    return made


def _inside(cursor: Cursor, block: Block, path: str, schema: Schema) -> Found:
    cursor.mark(path, block.start)
    return read_block(cursor.inside(path), block, schema)
