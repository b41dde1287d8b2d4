"""Layers unpacked into snapshots, by containerd's own diff service, each one once."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Sequence

import msgspec

from reconciler.executor.containerd import rpc
from reconciler.executor.containerd.client import Absent, AlreadyThere, Containerd, RuntimeFailed
from reconciler.executor.containerd.generated import diff_pb2, leases_pb2, types_pb2
from reconciler.executor.containerd.generated import snapshots_pb2 as pb

EXTRACT_PREFIX = "extract-"
"""Snapshots being unpacked; one that a crash leaves behind is swept at the next start."""

_UNPACK_TIMEOUT_S = 900.0
"""A layer of some gigabytes on a slow disk."""


class LayerMismatch(RuntimeFailed):
    """A layer is not what the image's config says it is, though each has its digest."""


class Layer(msgspec.Struct, frozen=True):
    """A layer's blob and the digest of its uncompressed tar."""

    media_type: str
    digest: str
    size: int
    diff_id: str


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """The name of each layer on top of those before it (OCI image specification, "ChainID")."""
    chain: list[str] = []
    for diff_id in diff_ids:
        name = f"{chain[-1]} {diff_id}".encode() if chain else b""
        chain.append("sha256:" + hashlib.sha256(name).hexdigest() if chain else diff_id)
    return chain


async def has_snapshot(client: Containerd, key: str) -> bool:
    """Whether a snapshot of that name exists, committed or not."""
    ask = pb.StatSnapshotRequest(snapshotter=client.snapshotter, key=key)
    try:
        await client.call(rpc.SNAPSHOT_STAT, ask)
    except Absent:
        return False
    return True


async def unpack(client: Containerd, lease: str, layers: Sequence[Layer]) -> str:
    """Unpack what is not yet unpacked; the chain id of the topmost layer."""
    parent = ""
    names = chain_ids([layer.diff_id for layer in layers])
    for layer, chain_id in zip(layers, names, strict=True):
        # Held before it is looked for: one that only a removed image used may go at any moment.
        await _hold(client, lease, chain_id)
        if not await has_snapshot(client, chain_id):
            await _unpack_layer(client, lease, layer, parent, chain_id)
        parent = chain_id
    return parent


async def remove_snapshot(client: Containerd, key: str) -> None:
    """Remove a snapshot if it is there."""
    ask = pb.RemoveSnapshotRequest(snapshotter=client.snapshotter, key=key)
    with contextlib.suppress(Absent):
        await client.call_uncut(rpc.SNAPSHOT_REMOVE, ask)


async def list_snapshots(client: Containerd) -> list[str]:
    """The names of all snapshots of the namespace."""
    ask = pb.ListSnapshotsRequest(snapshotter=client.snapshotter)
    names: list[str] = []
    async for answer in client.stream(rpc.SNAPSHOT_LIST, ask):
        names += [info.name for info in answer.info]
    return sorted(names)


async def _hold(client: Containerd, lease: str, key: str) -> None:
    held = leases_pb2.Resource(id=key, type=f"snapshots/{client.snapshotter}")
    await client.call(rpc.LEASE_ADD, leases_pb2.AddResourceRequest(id=lease, resource=held))


async def _unpack_layer(
    client: Containerd, lease: str, layer: Layer, parent: str, chain_id: str
) -> None:
    key = f"{EXTRACT_PREFIX}{secrets.token_hex(6)} {chain_id}"
    prepare = pb.PrepareSnapshotRequest(snapshotter=client.snapshotter, key=key, parent=parent)
    committed = False
    try:
        mounts = (await client.call_uncut(rpc.SNAPSHOT_PREPARE, prepare, lease=lease)).mounts
        blob = types_pb2.Descriptor(
            media_type=layer.media_type, digest=layer.digest, size=layer.size
        )
        apply = diff_pb2.ApplyRequest(diff=blob, mounts=mounts)
        applied = await client.call(rpc.DIFF_APPLY, apply, lease=lease, timeout_s=_UNPACK_TIMEOUT_S)
        if applied.applied.digest != layer.diff_id:
            what = f"the layer unpacks to {applied.applied.digest}, not to {layer.diff_id}"
            raise LayerMismatch(what, at=layer.digest)
        commit = pb.CommitSnapshotRequest(snapshotter=client.snapshotter, name=chain_id, key=key)
        with contextlib.suppress(AlreadyThere):  # another image shares the layer and was faster
            await client.call_uncut(rpc.SNAPSHOT_COMMIT, commit, lease=lease)
            committed = True
    finally:
        if not committed:
            await remove_snapshot(client, key)
