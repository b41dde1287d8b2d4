"""What a manifest may say that no part can do yet: planning it is refused at its position."""

from __future__ import annotations

from typing import NamedTuple

from reconciler.language.spec import Manifest, ServiceSpec, TaskSpec


class Unbuilt(NamedTuple):
    """A service or task, the field as `Reading.at` takes it, and what is not built, in words."""

    name: str
    field: str
    what: str


def unbuilt(manifest: Manifest) -> list[Unbuilt]:
    """Everything not built yet, by service and then by task; empty if all of it can run."""
    found: list[Unbuilt] = []
    for service in manifest.services:
        found += _of_service(service)
    for task in manifest.tasks:
        found.append(Unbuilt(task.name, "", "tasks"))
        if task.schedule:
            found.append(Unbuilt(task.name, "schedule", "cron schedules"))
        if task.run:
            found.append(Unbuilt(task.name, "run", "tasks that run with a deploy"))
        found += _of_both(task)
    return found


def _of_service(service: ServiceSpec) -> list[Unbuilt]:
    found = []
    if service.per_node:
        found.append(Unbuilt(service.name, "per_node", "one replica per node"))
    if service.strategy in {"rolling", "recreate"}:
        found.append(Unbuilt(service.name, "strategy", f"the strategy {service.strategy}"))
    if service.singleton:
        found.append(Unbuilt(service.name, "singleton", "singletons"))
    found += [Unbuilt(service.name, f"route.{one.host}{one.path}", "TLS by ACME (`tls = true`)")
              for one in service.routes if one.tls]
    found += [Unbuilt(service.name, f"listen.{one.protocol}:{one.port}", "raw ports at the edge")
              for one in service.listens]
    return found + _of_both(service)


def _of_both(spec: ServiceSpec | TaskSpec) -> list[Unbuilt]:
    return [
        *(Unbuilt(spec.name, f"file.{one.path}", "files in containers") for one in spec.files),
        *(Unbuilt(spec.name, f"volume.{one.name}", "volumes") for one in spec.volumes),
    ]
