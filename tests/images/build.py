"""OCI images made in pure Python, the same bytes at every build, and pushed to a registry.

`python -m tests.images.build URL` publishes the demo's images and prints their digests.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import tarfile
from dataclasses import dataclass, field

import httpx

from tests.images.compile import compile_server

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"

DEMO_TAGS = ("v1", "v2", "vbad")
DEMO_NAMES = ("web", "api")


@dataclass(frozen=True)
class Image:
    """A manifest or index, with every blob and further manifest that it names, by digest."""

    media_type: str
    manifest: bytes
    blobs: dict[str, bytes]
    manifests: dict[str, bytes] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """What a pin of this image is."""
        return digest_of(self.manifest)


@dataclass(frozen=True)
class File:
    """A file (or with `folder` a folder) of a layer."""

    path: str
    data: bytes = b""
    mode: int = 0o644
    folder: bool = False


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def layer(files: list[File]) -> tuple[bytes, str]:
    """A layer's compressed tar and its diff_id: no time, owner or order of the builder in it."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for file in sorted(files, key=lambda file: file.path):
            entry = tarfile.TarInfo(file.path)
            entry.mode = file.mode
            entry.type = tarfile.DIRTYPE if file.folder else tarfile.REGTYPE
            entry.size = len(file.data)
            tar.addfile(entry, io.BytesIO(file.data))
    tarred = raw.getvalue()
    return gzip.compress(tarred, mtime=0), digest_of(tarred)


def image(layers: list[tuple[bytes, str]], run: dict[str, object], arch: str = "amd64") -> Image:
    """An image of those layers; `run` is its config (Env, Cmd, Entrypoint, User and so on)."""
    config = _encode(
        {
            "architecture": arch,
            "os": "linux",
            "config": run,
            "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]},
        }
    )
    manifest = _encode(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": _descriptor(CONFIG, config),
            "layers": [_descriptor(LAYER, blob) for blob, _ in layers],
        }
    )
    blobs = {digest_of(blob): blob for blob in [config, *(blob for blob, _ in layers)]}
    return Image(MANIFEST, manifest, blobs)


def index(images: dict[str, Image]) -> Image:
    """One index of images for several architectures."""
    body = _encode(
        {
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": [
                _descriptor(MANIFEST, one.manifest)
                | {"platform": {"os": "linux", "architecture": arch}}
                for arch, one in images.items()
            ],
        }
    )
    blobs = {digest: blob for one in images.values() for digest, blob in one.blobs.items()}
    return Image(INDEX, body, blobs, {one.digest: one.manifest for one in images.values()})


def server_image(version: str, **env: str) -> Image:
    """The static server at a version; versions share the layer with the program."""
    people = b"root:x:0:0:root:/:/server\napp:x:1000:1000::/:/server\n"
    groups = b"root:x:0:\napp:x:1000:\nwheel:x:10:root,app\n"
    base = layer(
        [
            File("etc", folder=True, mode=0o755),
            File("etc/group", groups),
            File("etc/passwd", people),
            File("server", compile_server(), mode=0o755),
            File("tmp", folder=True, mode=0o1777),
        ]
    )
    top = layer([File("etc/version", f"{version}\n".encode())])
    settings = {"VERSION": version, **env}
    run: dict[str, object] = {
        "Entrypoint": ["/server"],
        "Env": [f"{name}={value}" for name, value in sorted(settings.items())],
        "WorkingDir": "/",
    }
    return image([base, top], run)


def push(
    url: str, repository: str, tag: str, one: Image, auth: tuple[str, str] | None = None
) -> str:
    """Push an image to the registry at `url`; its digest."""
    with httpx.Client(base_url=url, timeout=30, trust_env=False, auth=auth) as client:
        for digest, blob in one.blobs.items():
            if client.head(f"/v2/{repository}/blobs/{digest}").status_code == httpx.codes.OK:
                continue
            begun = client.post(f"/v2/{repository}/blobs/uploads/").raise_for_status()
            where = httpx.URL(url).join(begun.headers["Location"])
            done = where.copy_merge_params({"digest": digest})
            client.put(done, content=blob).raise_for_status()
        for digest, manifest in one.manifests.items():
            _put_manifest(client, repository, digest, MANIFEST, manifest)
        _put_manifest(client, repository, tag, one.media_type, one.manifest)
    return one.digest


def publish_demo_images(url: str, auth: tuple[str, str] | None = None) -> dict[str, str]:
    """Push `web` and `api` at v1, v2 and vbad (never healthy); digests by 'NAME:TAG'."""
    published = {}
    for name in DEMO_NAMES:
        for tag in DEMO_TAGS:
            failing = {"FAIL_HEALTH": "1"} if tag == "vbad" else {}
            one = server_image(tag, NAME=name, **failing)
            published[f"{name}:{tag}"] = push(url, name, tag, one, auth)
    return published


def _put_manifest(
    client: httpx.Client, repository: str, reference: str, media_type: str, body: bytes
) -> None:
    url, headers = f"/v2/{repository}/manifests/{reference}", {"Content-Type": media_type}
    client.put(url, content=body, headers=headers).raise_for_status()


def _descriptor(media_type: str, blob: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digest_of(blob), "size": len(blob)}


def _encode(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


if __name__ == "__main__":
    for name_and_tag, pin in publish_demo_images(sys.argv[1]).items():
        print(f"{name_and_tag} {pin}")
