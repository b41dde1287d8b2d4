"""An image, from its registry into containerd: verified, unpacked, kept from collection.

An image's record is named `REGISTRY/REPOSITORY@DIGEST`, so that a tag that moves takes nothing
away from a container that runs, or from a rollback. Its labels say what a start needs to know.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

import msgspec

from reconciler.executor.containerd import rpc
from reconciler.executor.containerd.client import (
    SLOW_TIMEOUT_S,
    Absent,
    AlreadyThere,
    Containerd,
    RuntimeFailed,
)
from reconciler.executor.containerd.content import (
    Expected,
    label_blob,
    read_blob,
    write_blob,
)
from reconciler.executor.containerd.generated import images_pb2 as pb
from reconciler.executor.containerd.generated import types_pb2
from reconciler.executor.containerd.image_ref import ImageRef
from reconciler.executor.containerd.registry import (
    INDEXES,
    MANIFESTS,
    Manifest,
    PullFailed,
    Registry,
)
from reconciler.executor.containerd.snapshot import Layer, LayerMismatch, has_snapshot, unpack

Progress = Callable[[int, int | None], None]
"""Called with the bytes fetched so far and the bytes to fetch in all, None while unknown."""

LAYERS = 128
"""overlayfs takes 500 lower directories; Docker stops at 127 layers."""

_BLOB_TRIES = 3
_BLOB_PAUSES_S = (0.1, 0.5)
_PARALLEL_BLOBS = 3
"""Downloads at a time per image, as Docker does."""

_PIN = "mill.pin."
_IMAGE, _CHAIN, _CONFIG, _SIZE = "mill.image", "mill.chain", "mill.config", "mill.size"
_GC_CONTENT = "containerd.io/gc.ref.content"
_GC_SNAPSHOT = "containerd.io/gc.ref.snapshot"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

T = TypeVar("T")


class ImageConfig(msgspec.Struct, frozen=True):
    """How the image says it is run; empty where it says nothing."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    workdir: str = ""
    user: str = ""
    stop_signal: str = ""


class PulledImage(msgspec.Struct, frozen=True):
    """An image that is unpacked here; `digest` is the pin, `size_bytes` that of its blobs."""

    name: str
    digest: str
    config: ImageConfig
    chain_id: str
    size_bytes: int
    cached: bool


class ImageRecord(msgspec.Struct, frozen=True):
    """An image as listed; `image` as its first pull wrote it, `pins` the names that hold it."""

    name: str
    image: str
    digest: str
    size_bytes: int
    pins: tuple[str, ...]


class _Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    media_type: str
    digest: str
    size: int
    platform: dict[str, Any] = {}


class _ManifestBody(msgspec.Struct, frozen=True):
    config: _Descriptor
    layers: list[_Descriptor]


class _IndexBody(msgspec.Struct, frozen=True):
    manifests: list[_Descriptor]


class _RootFs(msgspec.Struct, frozen=True):
    diff_ids: list[str]


class _Run(msgspec.Struct, frozen=True, rename="pascal"):
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    env: list[str] | None = None
    working_dir: str | None = None
    user: str | None = None
    stop_signal: str | None = None


class _ConfigBody(msgspec.Struct, frozen=True):
    rootfs: _RootFs
    config: _Run | None = None


async def pull(
    client: Containerd,
    image: str,
    digest: str | None,
    auth: str | None,
    progress: Progress,
) -> PulledImage:
    """Have `image` at `digest` (or at what its tag names now) unpacked here.

    One that is here already asks no registry where its digest is known. Pulls of the same image
    at the same time share one. Raises `PullFailed`, `RuntimeFailed`.
    """
    ref = ImageRef.parse(image)
    pin = digest or ref.digest
    async with client.lock(f"image {ref.name}@{pin or ref.tag}"):
        if pin and (present := await find_image(client, image, pin)):
            return present
        async with Registry(image, auth) as registry:
            if not pin:
                pin = await registry.digest_of(ref.tag)
                if present := await find_image(client, image, pin):
                    return present
            return await _fetch(client, registry, image, pin, progress)


async def image_present(client: Containerd, image: str, digest: str) -> bool:
    """Whether the image is here at that digest, unpacked; asks no registry."""
    return await find_image(client, image, digest) is not None


async def find_image(client: Containerd, image: str, digest: str) -> PulledImage | None:
    """The image at that digest if it is here, unpacked; asks no registry."""
    name = _record_name(image, digest)
    try:
        found = await client.call(rpc.IMAGE_GET, pb.GetImageRequest(name=name))
    except Absent:
        return None
    labels = found.image.labels
    if _CHAIN not in labels or not await has_snapshot(client, labels[_CHAIN]):
        return None
    config = _decode(_ConfigBody, await read_blob(client, labels[_CONFIG]), image)
    return PulledImage(
        name=name,
        digest=digest,
        config=_image_config(config),
        chain_id=labels[_CHAIN],
        size_bytes=int(labels[_SIZE]),
        cached=True,
    )


async def list_images(client: Containerd) -> list[ImageRecord]:
    """All images of the namespace, by name."""
    answer = await client.call(rpc.IMAGE_LIST, pb.ListImagesRequest())
    return [_record(image) for image in sorted(answer.images, key=lambda image: image.name)]


async def pin_image(client: Containerd, image: str, digest: str, pin: str) -> None:
    """Hold the image for `pin` (a service, an allocation): it is not removed meanwhile."""
    await _set_pin(client, image, digest, pin, "held")


async def unpin_image(client: Containerd, image: str, digest: str, pin: str) -> None:
    """Let go of `pin`; without that image or pin nothing happens."""
    with contextlib.suppress(Absent):
        await _set_pin(client, image, digest, pin, "")


async def remove_image(client: Containerd, image: str, digest: str) -> bool:
    """Remove the image and, before this returns, what only it used; False while it is pinned."""
    name = _record_name(image, digest)
    try:
        found = await client.call(rpc.IMAGE_GET, pb.GetImageRequest(name=name))
    except Absent:
        return True
    if _record(found.image).pins:
        return False
    ask = pb.DeleteImageRequest(name=name, sync=True)
    with contextlib.suppress(Absent):
        await client.call(rpc.IMAGE_DELETE, ask, timeout_s=SLOW_TIMEOUT_S)
    return True


async def _fetch(
    client: Containerd, registry: Registry, image: str, digest: str, progress: Progress
) -> PulledImage:
    progress(0, None)
    async with client.lease("pull") as lease:
        top = await registry.manifest(digest)
        manifest = await _for_this_machine(client, lease, registry, top, image)
        body = _decode(_ManifestBody, manifest.body, image)
        if len(body.layers) > LAYERS:
            raise registry.failed(f"{len(body.layers)} layers, over {LAYERS}", final=True)
        await _fetch_blobs(client, lease, registry, [body.config, *body.layers], progress)
        await _write_small(client, lease, manifest, _manifest_labels(body))
        config = _decode(_ConfigBody, await read_blob(client, body.config.digest), image)
        if len(config.rootfs.diff_ids) != len(body.layers):
            raise registry.failed("its config and its manifest disagree", final=True)
        layers = [
            Layer(blob.media_type, blob.digest, blob.size, diff_id)
            for blob, diff_id in zip(body.layers, config.rootfs.diff_ids, strict=True)
        ]
        try:
            chain_id = await unpack(client, lease, layers)
        except LayerMismatch as error:
            raise registry.failed(error.what, final=True) from error
        label = f"{_GC_SNAPSHOT}.{client.snapshotter}"
        await label_blob(client, body.config.digest, label, chain_id, lease)
        pulled = PulledImage(
            name=_record_name(image, digest),
            digest=digest,
            config=_image_config(config),
            chain_id=chain_id,
            size_bytes=sum(blob.size for blob in (body.config, *body.layers)),
            cached=False,
        )
        record = _new_record(pulled, top, image, body.config.digest)
        # The name holds the digest: a record that is there already says the same.
        with contextlib.suppress(AlreadyThere):
            await client.call(rpc.IMAGE_CREATE, pb.CreateImageRequest(image=record), lease=lease)
    return pulled


async def _for_this_machine(
    client: Containerd, lease: str, registry: Registry, top: Manifest, image: str
) -> Manifest:
    """The manifest itself, or the one of an index that is for this machine."""
    if top.media_type in MANIFESTS:
        return top
    if top.media_type not in INDEXES:
        raise registry.failed(f"media type {top.media_type!r} is not an image", final=True)
    wanted = _ARCHITECTURES.get(platform.machine(), platform.machine())
    for entry in _decode(_IndexBody, top.body, image).manifests:
        if (entry.platform.get("os"), entry.platform.get("architecture")) == ("linux", wanted):
            manifest = await registry.manifest(entry.digest)
            await _write_small(client, lease, top, {f"{_GC_CONTENT}.m.0": entry.digest})
            return manifest
    raise registry.failed(f"it has nothing for linux/{wanted}", final=True)


async def _fetch_blobs(
    client: Containerd,
    lease: str,
    registry: Registry,
    blobs: list[_Descriptor],
    progress: Progress,
) -> None:
    wanted = {blob.digest: blob for blob in blobs}  # a layer may occur twice
    total, done = sum(blob.size for blob in wanted.values()), dict.fromkeys(wanted, 0)
    slots = asyncio.Semaphore(_PARALLEL_BLOBS)

    def report(digest: str, fetched: int) -> None:
        done[digest] = fetched
        progress(sum(done.values()), total)

    async def fetch(blob: _Descriptor) -> None:
        async with slots, client.lock(f"blob {blob.digest}"):
            await _fetch_blob(client, lease, registry, blob, report)
        report(blob.digest, blob.size)

    try:
        async with asyncio.TaskGroup() as group:
            for blob in wanted.values():
                group.create_task(fetch(blob))
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from several


async def _fetch_blob(
    client: Containerd,
    lease: str,
    registry: Registry,
    blob: _Descriptor,
    report: Callable[[str, int], None],
) -> None:
    """Fetch one blob; a download that breaks off goes on where it broke.

    All tries are under one lease: without it containerd drops what has been fetched so far.
    """

    async def chunks(offset: int) -> AsyncGenerator[bytes, None]:
        async with registry.open_blob(blob.digest, offset) as opened:
            async for chunk in opened.chunks:
                offset += len(chunk)
                report(blob.digest, min(offset, blob.size))
                yield chunk

    labels = {f"containerd.io/distribution.source.{registry.ref.registry}": registry.ref.repository}
    expected = Expected(blob.digest, blob.size, labels)
    for pause_s in (*_BLOB_PAUSES_S, None):
        try:
            await write_blob(client, lease, expected, chunks)
        except (PullFailed, RuntimeFailed) as error:
            if pause_s is None or (isinstance(error, PullFailed) and error.final):
                if isinstance(error, PullFailed):
                    raise
                raise registry.failed(f"blob {blob.digest}: {error.what}") from error
            await asyncio.sleep(pause_s)
        else:
            return


async def _write_small(
    client: Containerd, lease: str, manifest: Manifest, labels: dict[str, str]
) -> None:
    async def chunks(offset: int) -> AsyncGenerator[bytes, None]:
        yield manifest.body[offset:]

    expected = Expected(manifest.digest, len(manifest.body), labels)
    async with client.lock(f"blob {manifest.digest}"):
        await write_blob(client, lease, expected, chunks)


def _new_record(pulled: PulledImage, top: Manifest, image: str, config: str) -> pb.Image:
    return pb.Image(
        name=pulled.name,
        labels={
            _IMAGE: image,
            _CHAIN: pulled.chain_id,
            _CONFIG: config,
            _SIZE: str(pulled.size_bytes),
        },
        target=types_pb2.Descriptor(
            media_type=top.media_type, digest=top.digest, size=len(top.body)
        ),
    )


async def _set_pin(client: Containerd, image: str, digest: str, pin: str, value: str) -> None:
    record = pb.Image(name=_record_name(image, digest), labels={_PIN + pin: value})
    ask = pb.UpdateImageRequest(image=record)
    ask.update_mask.paths.append(f"labels.{_PIN}{pin}")
    await client.call(rpc.IMAGE_UPDATE, ask)


def _record_name(image: str, digest: str) -> str:
    return f"{ImageRef.parse(image).name}@{digest}"


def _record(image: pb.Image) -> ImageRecord:
    pins = sorted(label.removeprefix(_PIN) for label in image.labels if label.startswith(_PIN))
    return ImageRecord(
        name=image.name,
        image=image.labels.get(_IMAGE, image.name),
        digest=image.target.digest,
        size_bytes=int(image.labels.get(_SIZE, "0")),
        pins=tuple(pins),
    )


def _manifest_labels(body: _ManifestBody) -> dict[str, str]:
    layers = {f"{_GC_CONTENT}.l.{i}": blob.digest for i, blob in enumerate(body.layers)}
    return {f"{_GC_CONTENT}.config": body.config.digest} | layers


def _image_config(body: _ConfigBody) -> ImageConfig:
    run = body.config or _Run()
    return ImageConfig(
        entrypoint=tuple(run.entrypoint or ()),
        cmd=tuple(run.cmd or ()),
        env=tuple(run.env or ()),
        workdir=run.working_dir or "",
        user=run.user or "",
        stop_signal=run.stop_signal or "",
    )


def _decode(kind: type[T], body: bytes, image: str) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise PullFailed(image, f"its manifest cannot be read: {error}", final=True) from error
