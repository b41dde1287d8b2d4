"""The two blocks at the top of a file that run something: service and task."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from reconciler.language import blocks
from reconciler.language.addresses import image
from reconciler.language.cron import schedule
from reconciler.language.ledger import Cursor
from reconciler.language.problems import Flaw, quoted
from reconciler.language.schema import Field, Found, Schema, Sub, read_block
from reconciler.language.spec import (
    FileBlock,
    Health,
    Listen,
    Route,
    ServiceSpec,
    TaskSpec,
    Volume,
)
from reconciler.language.syntax import Block, Value
from reconciler.language.values import (
    NAME,
    Unfit,
    boolean,
    cpu,
    duration,
    integer,
    items,
    matching,
    one_of,
    path,
    paths,
    secret_name,
    size,
    strings,
)

_KEPT_STRATEGIES = ("auto", "recreate")
_One = TypeVar("_One")

read_port = integer(1, 65535)


def _entrypoint(cursor: Cursor, value: Value) -> tuple[str, ...]:
    found = strings(cursor, value)
    if found and not found[0]:
        raise Unfit(value.start, "begins with an empty program")
    return found


def _depends_on(cursor: Cursor, value: Value) -> tuple[str, ...]:
    """Names in a fixed order; that each is a service is checked over the whole manifest."""
    found: set[str] = set()
    for name, item in items(cursor, value):
        if not NAME.fullmatch(name):
            raise Unfit(item.start, f"names {quoted(name)}, which is no name of a service")
        if name in found:
            raise Unfit(item.start, f"names {quoted(name)} twice")
        found.add(name)
        use = cursor.use(name, item.start)
        cursor.ledger.depends.append(use._replace(field="depends_on"))
    return tuple(sorted(found))


_COMMON = {
    "image": Field("image", image, True),
    "cpu": Field("cpu_milli", cpu),
    "memory": Field("memory_bytes", size(4_000_000, 16 * 1_000**4, "4M to 16T")),
    "command": Field("command", strings),
    "entrypoint": Field("entrypoint", _entrypoint),
    "user": Field("user", matching(
        r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})?",
        'a user such as "1000:1000" or "web"')),
    "workdir": Field("workdir", path),
    "read_only": Field("read_only", boolean),
    "tmpfs": Field("tmpfs", paths),
    "pull": Field("pull", one_of("missing", "always")),
    "registry_auth": Field("registry_auth", secret_name),
}
_COMMON_BLOCKS = {
    "env": Sub("env", blocks.env),
    "file": Sub("files", blocks.file, 1, many=True),
    "volume": Sub("volumes", blocks.volume, 1, many=True),
}
SERVICE = Schema("a service", {
    **_COMMON,
    "port": Field("port", read_port),
    "replicas": Field("replicas", integer(0, 1000)),
    "per_node": Field("per_node", boolean),
    "depends_on": Field("depends_on", _depends_on),
    "strategy": Field("strategy", one_of("auto", "surge", "rolling", "recreate")),
    "max_parallel": Field("max_parallel", integer(1, 1000)),
    "singleton": Field("singleton", boolean),
    "bake": Field("bake_ms", duration),
    "stop_timeout": Field("stop_timeout_ms", duration),
}, {
    **_COMMON_BLOCKS,
    "health": Sub("health", blocks.health),
    "route": Sub("routes", blocks.route, 1, many=True),
    "listen": Sub("listens", blocks.listen, 1, many=True),
})
TASK = Schema("a task", {
    **_COMMON,
    "timeout": Field("timeout_ms", duration),
    "schedule": Field("schedule", schedule),
    "timezone": Field("timezone", matching(
        r"[A-Za-z][A-Za-z0-9_+-]{0,31}(/[A-Za-z0-9_+-]{1,31}){0,2}",
        'a time zone such as "UTC" or "Europe/Berlin"')),
    "overlap": Field("overlap", one_of("skip", "queue", "allow")),
    "run": Field("run", one_of("before", "after")),
}, _COMMON_BLOCKS)


def read_service(cursor: Cursor, block: Block) -> ServiceSpec | None:
    """One service, every default filled in; None if anything about it is wrong."""
    before = len(cursor.ledger.flaws)
    found = read_block(cursor, block, SERVICE)
    values = found.values
    listed: list[Listen] = _listed(values, "listens", Listen)
    _check_port(cursor, found)
    _check_replicas(cursor, found)
    health = _health(cursor, found)
    mounts = _mounts(cursor, found)
    if len(cursor.ledger.flaws) > before or health is None:
        return None
    values |= {"name": cursor.owner, "health": health, **mounts,
               "routes": tuple(sorted(_listed(values, "routes", Route))),
               "listens": tuple(sorted(listed))}
    return msgspec.convert(values, ServiceSpec)


def read_task(cursor: Cursor, block: Block) -> TaskSpec | None:
    """One task, every default filled in; None if anything about it is wrong."""
    before = len(cursor.ledger.flaws)
    found = read_block(cursor, block, TASK)
    for name in ("timezone", "overlap"):
        if found.has(name) and not found.has("schedule"):
            cursor.flaw(Flaw(found.starts[name], f"`{name}` says nothing without `schedule`",
                             'add schedule = "0 3 * * *", or leave it out'))
    mounts = _mounts(cursor, found)
    if len(cursor.ledger.flaws) > before:
        return None
    return msgspec.convert({"name": cursor.owner, **found.values, **mounts}, TaskSpec)


def _listed(values: dict[str, object], field: str, kind: type[_One]) -> list[_One]:
    found = values.get(field, [])
    assert isinstance(found, list)
    return [one for one in found if isinstance(one, kind)]


def _check_port(cursor: Cursor, found: Found) -> None:
    """A worker, which has no port, has no address: nothing can be sent to it."""
    if found.has("port"):
        return
    for name in ("route", "listen"):
        if found.has(name):
            cursor.flaw(Flaw(found.starts[name], f"`{name}` needs a service with a `port`",
                             "add port = N, where the container listens"))


def _check_replicas(cursor: Cursor, found: Found) -> None:
    values, starts = found.values, found.starts
    per_node = values.get("per_node") is True
    replicas = values.get("replicas", 1)
    assert isinstance(replicas, int)
    if per_node and found.has("replicas"):
        cursor.flaw(Flaw(starts["replicas"], "`replicas` and `per_node` exclude each other",
                         "keep one of them"))
    if values.get("singleton") is True and (per_node or replicas > 1):
        cursor.flaw(Flaw(starts["singleton"], "a singleton runs one replica",
                         "leave out `singleton`, or `replicas` and `per_node`"))
    if not any(not one.ephemeral for one in _listed(values, "volumes", Volume)):
        return
    if per_node or replicas > 1:
        cursor.flaw(Flaw(starts["per_node" if per_node else "replicas"],
                         "a service with a volume that is kept runs one replica",
                         "write replicas = 1, or ephemeral = true in the volume"))
    if values.get("strategy", "auto") not in _KEPT_STRATEGIES:
        cursor.flaw(Flaw(starts["strategy"],
                         "a service with a volume that is kept is replaced by `recreate`",
                         'write strategy = "recreate", or leave it out'))


def _health(cursor: Cursor, found: Found) -> Health | None:
    """With no block, or one that names no way: a port means tcp, no port means running."""
    block = found.values.get("health")
    if block is None:
        if found.has("health"):
            return None
        return Health(kind="tcp" if found.has("port") else "running")
    assert isinstance(block, Found)
    kind = block.values.setdefault("kind", "tcp" if found.has("port") else "running")
    if kind in {"http", "tcp"} and not found.has("port"):
        name = "path" if kind == "http" else "tcp"
        cursor.flaw(Flaw(block.starts[name], f"`{name}` needs a service with a `port`",
                         "add port = N, or probe by command = [...]"))
    return msgspec.convert(block.values, Health)


def _mounts(cursor: Cursor, found: Found) -> dict[str, tuple[FileBlock | Volume, ...]]:
    """Files and volumes in a fixed order; two of a name, or on one path, are a flaw."""
    files = _listed(found.values, "files", FileBlock)
    volumes = _listed(found.values, "volumes", Volume)
    tmpfs = found.values.get("tmpfs", ())
    assert isinstance(tmpfs, tuple)
    names: set[str] = set()
    for one in volumes:
        if one.name in names:
            _repeated(cursor, f"volume.{one.name}", f"volume `{one.name}`")
        names.add(one.name)
    taken: set[str] = set(tmpfs)
    for where in [*(one.path for one in files), *(one.path for one in volumes)]:
        if where in taken:
            start = found.starts["volume" if files == [] else "file"]
            cursor.flaw(Flaw(start, f"{quoted(where)} is mounted twice", "keep one of them"))
        taken.add(where)
    return {"files": tuple(sorted(files, key=lambda one: one.path)),
            "volumes": tuple(sorted(volumes))}


def _repeated(cursor: Cursor, field: str, what: str) -> None:
    place = cursor.ledger.marks[cursor.owner][field]
    cursor.ledger.flaw(place, f"the {what} is written twice", "keep one of them")
