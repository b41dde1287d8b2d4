"""A spec's fields as a person wrote them, and which of them differ between two specs.

Names and units are those of the language; a secret is shown as `${secret(NAME)}`, never opened.
"""

from __future__ import annotations

import hashlib
import json
from typing import assert_never

from reconciler.fsm.records import FieldChange, SecretPin
from reconciler.language.spec import (
    AddressRef,
    EnvVar,
    FileBlock,
    Health,
    Route,
    SecretRef,
    ServiceSpec,
    TaskSpec,
    Template,
    Text,
    Volume,
)

MAX_VALUE_CHARS = 200
"""Of one side of a change; a file's content may be 256 KiB."""

_UNITS_MS = (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1))
_UNITS_BYTES = (
    ("T", 10**12), ("G", 10**9), ("M", 10**6), ("K", 10**3),
    ("Ti", 1 << 40), ("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10),
)


def cores(cpu_milli: int) -> str:
    """Cores as the language writes them: `0.25`, `2`."""
    return f"{cpu_milli / 1000:g}" if cpu_milli < 100_000_000 else str(cpu_milli // 1000)


def size(memory_bytes: int) -> str:
    """Bytes in the largest unit that divides them: `512M`, `1Gi`, `1234`."""
    for unit, factor in _UNITS_BYTES:
        if memory_bytes and memory_bytes % factor == 0:
            return f"{memory_bytes // factor}{unit}"
    return str(memory_bytes)


def about(memory_bytes: int) -> str:
    """Bytes for a message, three figures: `1.25G`, `0`."""
    for unit, factor in _UNITS_BYTES[:4]:
        if memory_bytes >= factor:
            return f"{memory_bytes / factor:.3g}{unit}"
    return str(memory_bytes)


def duration(ms: int) -> str:
    """Milliseconds in the largest unit that divides them: `5s`, `90s`, `1500ms`."""
    for unit, factor in _UNITS_MS:
        if ms and ms % factor == 0:
            return f"{ms // factor}{unit}"
    return "0s"


def template(parts: Template) -> str:
    """A string with its references, as written."""
    shown: list[str] = []
    for part in parts:
        match part:
            case Text():
                shown.append(part.text.replace("${", "$${"))
            case SecretRef():
                shown.append(f"${{secret({part.name})}}")
            case AddressRef():
                shown.append(f"${{service.{part.service}.address}}")
            case _:
                assert_never(part)
    return "".join(shown)


def templates(spec: ServiceSpec | TaskSpec) -> list[Template]:
    """Every string of a spec that may refer to a secret or a service."""
    return [*(var.value for var in spec.env), *(block.content for block in spec.files)]


def secret_names(spec: ServiceSpec | TaskSpec) -> list[str]:
    """The secrets that a container of this spec is started with, sorted, each once."""
    parts = (part for value in templates(spec) for part in value)
    return sorted({part.name for part in parts if isinstance(part, SecretRef)})


def address_names(spec: ServiceSpec | TaskSpec) -> list[str]:
    """The services whose address this spec names, sorted, each once."""
    parts = (part for value in templates(spec) for part in value)
    return sorted({part.service for part in parts if isinstance(part, AddressRef)})


def field_texts(spec: ServiceSpec) -> dict[str, str]:
    """Each field's text by its name in the language, but for `image`, in the order shown."""
    fields = {
        "port": "" if spec.port is None else str(spec.port),
        "replicas": "per_node" if spec.per_node else str(spec.replicas),
        "cpu": cores(spec.cpu_milli),
        "memory": size(spec.memory_bytes),
        "command": _words(spec.command),
        "entrypoint": _words(spec.entrypoint),
        "user": spec.user,
        "workdir": spec.workdir,
        "read_only": _flag(spec.read_only),
        "tmpfs": _words(spec.tmpfs or None),
        "depends_on": _words(spec.depends_on or None),
        "strategy": spec.strategy,
        "max_parallel": str(spec.max_parallel),
        "singleton": _flag(spec.singleton),
        "bake": duration(spec.bake_ms),
        "stop_timeout": duration(spec.stop_timeout_ms),
        "pull": spec.pull,
        "registry_auth": spec.registry_auth,
    }
    fields |= {f"env.{var.key}": _env(var) for var in spec.env}
    fields |= {f"file.{block.path}": _file(block) for block in spec.files}
    fields |= _health(spec.health)
    fields |= {f"route.{route.host}{route.path}": _route(route) for route in spec.routes}
    fields |= {f"listen.{listen.protocol}.{listen.port}": "open" for listen in spec.listens}
    fields |= {f"volume.{volume.name}": _volume(volume) for volume in spec.volumes}
    return fields


def changed_fields(old: ServiceSpec, new: ServiceSpec) -> list[FieldChange]:
    """The fields that differ, `image` left out; one that is absent on a side is empty there."""
    before, after = field_texts(old), field_texts(new)
    names = [*before, *(name for name in after if name not in before)]
    return [
        FieldChange(name, _cut(before.get(name, "")), _cut(after.get(name, "")))
        for name in names
        if before.get(name, "") != after.get(name, "")
    ]


def changed_secrets(
    old: tuple[SecretPin, ...], new: tuple[SecretPin, ...]
) -> list[FieldChange]:
    """Secrets that both sides use, in another version."""
    before = {pin.name: pin.version for pin in old}
    return [
        FieldChange(f"secret.{pin.name}", f"version {before[pin.name]}", f"version {pin.version}")
        for pin in new
        if before.get(pin.name, pin.version) != pin.version
    ]


def pinned(image: str, digest: str) -> str:
    """An image with the digest it stands for: `HOST/NAME:TAG@sha256:…`."""
    return image if not digest or "@" in image else f"{image}@{digest}"


def _words(words: tuple[str, ...] | None) -> str:
    return "" if words is None else json.dumps(list(words), ensure_ascii=False)


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _env(var: EnvVar) -> str:
    return json.dumps(template(var.value), ensure_ascii=False)


def _file(block: FileBlock) -> str:
    return f"{block.mode} {json.dumps(template(block.content), ensure_ascii=False)}"


def _health(health: Health) -> dict[str, str]:
    match health.kind:
        case "http":
            probe = f"path {health.path}"
        case "command":
            probe = f"command {_words(health.command)}"
        case "tcp" | "running":
            probe = health.kind
        case _:
            assert_never(health.kind)
    return {
        "health": probe,
        "health.interval": duration(health.interval_ms),
        "health.timeout": duration(health.timeout_ms),
        "health.deadline": duration(health.deadline_ms),
        "health.healthy": str(health.healthy),
        "health.unhealthy": str(health.unhealthy),
    }


def _route(route: Route) -> str:
    flags = [
        name
        for name, on in (
            ("websocket", route.websocket),
            ("strip_prefix", route.strip_prefix),
            ("tls", route.tls),
        )
        if on
    ]
    return ", ".join(["on", *flags])


def _volume(volume: Volume) -> str:
    kind = "ephemeral" if volume.ephemeral else size(volume.size_bytes)
    return f"{volume.path} {kind}"


def _cut(text: str) -> str:
    """A long text by its beginning and a fingerprint, so that two that differ look different."""
    if len(text) <= MAX_VALUE_CHARS:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{text[:MAX_VALUE_CHARS]}… ({len(text)} characters, sha256 {digest})"
