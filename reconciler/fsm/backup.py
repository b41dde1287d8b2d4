"""What of a cluster outlives it: the part of a state that a backup carries and a restore takes."""

from __future__ import annotations

import hashlib

import msgspec
from msgspec.structs import replace

from reconciler.errors import Unprocessable
from reconciler.fsm.records import Revision, Secret, Service, Source
from reconciler.fsm.state import State
from reconciler.language.spec import ServiceSpec

VERSION = 1
RESTORED = "restored from a backup"
"""Why a source is suspended after a restore."""


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """Services with their kept revisions and specs, secrets, sources: as at `index`.

    Not in it: nodes and allocations (machines differ), tokens and the authority (a new cluster has
    its own), deploys and events (their ids are indexes of another log). Secrets are sealed with
    whichever key the holder of this knows.
    """

    cluster: str
    index: int
    time_ms: int
    services: dict[str, Service]
    specs: dict[str, ServiceSpec]
    secrets: dict[str, Secret]
    sources: dict[str, Source]
    next_vip: int


def contents(state: State) -> Contents:
    """What a backup of `state` carries; services that nothing is committed of are left out."""
    services = {
        name: replace(service, revisions=tuple(map(_elsewhere, service.revisions)))
        for name, service in sorted(state.services.items()) if service.live
    }
    needed = {r.spec_hash for service in services.values() for r in service.revisions}
    return Contents(
        cluster=state.cluster, index=state.index, time_ms=state.time_ms, services=services,
        specs={key: state.specs[key] for key in sorted(needed)},
        secrets=dict(sorted(state.secrets.items())),
        sources={name: _resting(s) for name, s in sorted(state.sources.items())},
        next_vip=state.next_vip,
    )


def encode_contents(carried: Contents) -> bytes:
    """Msgpack behind a version byte."""
    return bytes([VERSION]) + msgspec.msgpack.encode(carried)


def decode_contents(data: bytes) -> Contents:
    """Raises Unprocessable where it is of another format, or does not hold together."""
    if not data or data[0] != VERSION:
        raise Unprocessable("the backup is of a format that this version does not know",
                            hint="restore it with the version that wrote it, or a newer one")
    try:
        carried = msgspec.msgpack.decode(memoryview(data)[1:], type=Contents)
    except msgspec.DecodeError as error:
        raise Unprocessable(f"the backup cannot be read: {error}") from error
    for name, service in carried.services.items():
        if service.revision(service.live) is None:
            raise Unprocessable(f"the backup lacks the live revision of {name}")
        if any(r.spec_hash not in carried.specs for r in service.revisions):
            raise Unprocessable(f"the backup lacks a spec of {name}")
    return carried


def digest(data: bytes) -> str:
    """Under what the pieces of encoded contents are sent."""
    return hashlib.sha256(data).hexdigest()


def _elsewhere(revision: Revision) -> Revision:
    """Its deploy's id is an index of the log that it comes from, and means another one here."""
    return replace(revision, deploy="")


def _resting(source: Source) -> Source:
    """Restored, it must not move anything before a person has looked."""
    return replace(source, status="suspended", reason=RESTORED)
