"""The typed result of a manifest: what is hashed, logged and deployed.

Every field is in its unit: `cpu_milli` thousandths of a core, `*_bytes`, `*_ms`. Collections
whose order has no meaning are sorted by the reader (env by key, routes by host and path), so
that two texts with the same meaning are equal and have the same hash.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec


class Text(msgspec.Struct, frozen=True, tag="text", forbid_unknown_fields=True):
    """A literal piece of a template."""

    text: str


class SecretRef(msgspec.Struct, frozen=True, tag="secret", forbid_unknown_fields=True):
    """`${secret(NAME)}`."""

    name: str


class AddressRef(msgspec.Struct, frozen=True, tag="address", forbid_unknown_fields=True):
    """`${service.NAME.address}`, which reads `NAME.mill:PORT` at start."""

    service: str


Part = Text | SecretRef | AddressRef
Template = tuple[Part, ...]


class EnvVar(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One environment variable."""

    key: str
    value: Template


class FileBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file inside the container, its mode in octal digits such as `0440`."""

    path: str
    content: Template
    mode: str = "0444"


HealthKind = Literal["http", "tcp", "command", "running"]


class Health(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How an allocation proves that it serves. `path` for http, `command` for command."""

    kind: HealthKind
    path: str = ""
    command: tuple[str, ...] = ()
    interval_ms: int = 10_000
    timeout_ms: int = 2_000
    deadline_ms: int = 60_000
    healthy: int = 1
    unhealthy: int = 3


class Route(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, order=True):
    """A host (`app.example.com`, `*.example.com` or `*`, lower case) and a path prefix."""

    host: str
    path: str = "/"
    websocket: bool = False
    strip_prefix: bool = False
    tls: bool = False


class Listen(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, order=True):
    """A raw port at the edge."""

    protocol: Literal["tcp", "udp"]
    port: int


class Volume(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, order=True):
    """A named folder; `size_bytes` 0 where ephemeral."""

    name: str
    path: str
    ephemeral: bool = False
    size_bytes: int = 0


Strategy = Literal["auto", "surge", "rolling", "recreate"]


class ServiceSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One `service` block, every default filled in."""

    name: str
    image: str
    health: Health
    port: int | None = None
    replicas: int = 1
    per_node: bool = False
    cpu_milli: int = 250
    memory_bytes: int = 256_000_000
    command: tuple[str, ...] | None = None
    entrypoint: tuple[str, ...] | None = None
    user: str = ""
    workdir: str = ""
    read_only: bool = False
    tmpfs: tuple[str, ...] = ()
    depends_on: tuple[str, ...] = ()
    strategy: Strategy = "auto"
    max_parallel: int = 1
    singleton: bool = False
    bake_ms: int = 1_000
    stop_timeout_ms: int = 10_000
    pull: Literal["missing", "always"] = "missing"
    registry_auth: str = ""
    env: tuple[EnvVar, ...] = ()
    files: tuple[FileBlock, ...] = ()
    routes: tuple[Route, ...] = ()
    listens: tuple[Listen, ...] = ()
    volumes: tuple[Volume, ...] = ()


class TaskSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One `task` block, every default filled in. `schedule` is cron; `run` "" when neither."""

    name: str
    image: str
    cpu_milli: int = 250
    memory_bytes: int = 256_000_000
    timeout_ms: int = 3_600_000
    command: tuple[str, ...] | None = None
    entrypoint: tuple[str, ...] | None = None
    user: str = ""
    workdir: str = ""
    read_only: bool = False
    tmpfs: tuple[str, ...] = ()
    pull: Literal["missing", "always"] = "missing"
    registry_auth: str = ""
    schedule: str = ""
    timezone: str = "UTC"
    overlap: Literal["skip", "queue", "allow"] = "skip"
    run: Literal["", "before", "after"] = ""
    env: tuple[EnvVar, ...] = ()
    files: tuple[FileBlock, ...] = ()
    volumes: tuple[Volume, ...] = ()


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All services and tasks of one manifest, each sorted by name."""

    services: tuple[ServiceSpec, ...] = ()
    tasks: tuple[TaskSpec, ...] = ()


def canonical(spec: ServiceSpec | TaskSpec) -> bytes:
    """The one encoding of a spec: msgpack of its fields in declared order."""
    return msgspec.msgpack.encode(spec)


def spec_hash(spec: ServiceSpec | TaskSpec) -> str:
    """SHA-256 of the canonical encoding, 64 hex digits."""
    return hashlib.sha256(canonical(spec)).hexdigest()


def run_hash(spec: ServiceSpec) -> str:
    """SHA-256 of what a container is started with.

    Two revisions with the same run hash (and image digest) may share containers: a change of
    replicas, routes, order or strategy alone starts nothing again.
    """
    bare = msgspec.structs.replace(
        spec, replicas=1, per_node=False, routes=(), listens=(), depends_on=(),
        strategy="auto", max_parallel=1, singleton=False, bake_ms=0, stop_timeout_ms=0,
        pull="missing", registry_auth="",
    )
    return hashlib.sha256(msgspec.msgpack.encode(bare)).hexdigest()
