"""Events: what happened, as the deploy stream and `/v1/events` show it.

The data classes encode to the JSON of the contract by themselves: the tag field is `phase` for
progress, and unset optional fields are left out.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Started(
    msgspec.Struct, frozen=True, tag_field="phase", tag="started", omit_defaults=True
):
    """The deploy was admitted; `services` counts those that change."""

    deploy: str
    services: int = -1


class Scheduled(msgspec.Struct, frozen=True, tag_field="phase", tag="scheduled"):
    """An allocation got its node."""

    service: str
    alloc: str
    node: str


class Pulling(msgspec.Struct, frozen=True, tag_field="phase", tag="pulling", omit_defaults=True):
    """Pulls begin (no fields), or a pull's progress in bytes (never in the log)."""

    image: str = ""
    node: str = ""
    bytes: int = -1
    total: int = -1


class Pulled(msgspec.Struct, frozen=True, tag_field="phase", tag="pulled", omit_defaults=True):
    """One image stands on one node, or (no fields) all do."""

    image: str = ""
    node: str = ""
    cached: bool | None = None


class Starting(msgspec.Struct, frozen=True, tag_field="phase", tag="starting"):
    """An allocation's container is being started."""

    service: str
    alloc: str
    node: str


class Healthy(msgspec.Struct, frozen=True, tag_field="phase", tag="healthy", omit_defaults=True):
    """One allocation passed, or (no `alloc`) the service's last one did. Seconds."""

    service: str
    elapsed: float = -1.0
    alloc: str = ""
    node: str = ""


class Routed(msgspec.Struct, frozen=True, tag_field="phase", tag="routed"):
    """The change is committed and every live edge sends traffic to the new set."""


class Stopped(msgspec.Struct, frozen=True, tag_field="phase", tag="stopped"):
    """An allocation of the old set has ended."""

    service: str
    alloc: str
    node: str


class RollingBack(msgspec.Struct, frozen=True, tag_field="phase", tag="rolling_back"):
    """The deploy failed; what it started is being taken down."""

    reason: str


class Warned(msgspec.Struct, frozen=True, tag_field="phase", tag="warning"):
    """Something a person should know; the deploy goes on."""

    message: str


class Done(msgspec.Struct, frozen=True, tag_field="phase", tag="done"):
    """Terminal: deployed. Seconds."""

    elapsed: float
    changed: int
    success: bool = True
    outcome: str = "deployed"


class Failed(msgspec.Struct, frozen=True, tag_field="phase", tag="failed"):
    """Terminal: not deployed, and what became of it. Seconds."""

    elapsed: float
    outcome: str
    service: str
    alloc: str
    node: str
    reason: str
    logs: tuple[str, ...]
    success: bool = False


class Note(msgspec.Struct, frozen=True, tag_field="phase", tag="note", omit_defaults=True):
    """A cluster event outside any deploy's stream: nodes, sources, secrets, healing."""

    kind: str
    subject: str
    message: str = ""
    node: str = ""


Data = (
    Started | Scheduled | Pulling | Pulled | Starting | Healthy | Routed | Stopped
    | RollingBack | Warned | Done | Failed | Note
)


class Event(msgspec.Struct, frozen=True):
    """A fact: the log index that made it, its logged time, its deploy ("" for none)."""

    index: int
    at_ms: int
    deploy: str
    data: Data

    @property
    def kind(self) -> Literal["progress", "done", "failed"]:
        """The `event:` field of the stream."""
        if isinstance(self.data, Done):
            return "done"
        return "failed" if isinstance(self.data, Failed) else "progress"

    def wire(self) -> dict[str, object]:
        """The `data:` object of the stream; terminal events carry no `phase`."""
        fields: dict[str, object] = msgspec.to_builtins(self.data)
        if isinstance(self.data, Done | Failed):
            del fields["phase"]
        return fields
