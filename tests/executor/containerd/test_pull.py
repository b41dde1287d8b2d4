"""Pulls from real registries into a real containerd, and the ways they go wrong."""

import asyncio
import random
from pathlib import Path

import pytest

from reconciler.executor.containerd import daemon, pull
from reconciler.executor.containerd.client import Containerd
from reconciler.executor.containerd.generated import content_pb2
from reconciler.executor.containerd.registry import PullFailed, resolve
from reconciler.executor.containerd.rpc import CONTENT_INGESTS, CONTENT_LIST
from reconciler.executor.containerd.snapshot import list_snapshots
from tests.executor.containerd.conftest import unseen
from tests.images.build import File, Image, image, index, layer, push, server_image
from tests.images.registry import PASSWORD, USER, local_registry
from tests.images.served import served_registry

pytestmark = pytest.mark.containers


def big_image(seed: bytes) -> tuple[Image, str]:
    """An image whose one layer does not compress, and that layer's digest."""
    blob, diff_id = layer([File("data", random.Random(seed).randbytes(3 << 20))])
    one = image([(blob, diff_id)], {"Cmd": ["/data"]})
    return one, next(digest for digest, body in one.blobs.items() if body == blob)


async def blobs(client: Containerd) -> set[str]:
    answers = client.stream(CONTENT_LIST, content_pb2.ListContentRequest())
    return {info.digest async for answer in answers for info in answer.info}


async def test_an_image_is_pulled_verified_and_unpacked(
    client: Containerd, registry: str, image: Image
) -> None:
    progress: list[tuple[int, int | None]] = []

    got = await pull.pull(
        client, f"{registry}/web:v1", None, None, lambda *now: progress.append(now)
    )

    assert (got.digest, got.cached) == (image.digest, False)
    assert got.config.entrypoint == ("/server",)
    assert "VERSION=v1" in got.config.env
    assert got.chain_id in await list_snapshots(client)
    assert progress[0] == (0, None)
    assert progress[-1] == (got.size_bytes, got.size_bytes)
    assert await blobs(client) == {image.digest, *image.blobs}


async def test_a_pinned_image_that_is_here_asks_no_registry(client: Containerd) -> None:
    one = server_image("v1")
    with served_registry() as registry:
        registry.hold("v1", one)
        name = f"{registry.host}/web:v1"
        first = await pull.pull(client, name, one.digest, None, unseen)
        asked = len(registry.log)
        again = await pull.pull(client, name, one.digest, None, unseen)
        assert len(registry.log) == asked
    assert not first.cached
    assert again.cached
    assert (again.config, again.chain_id, again.size_bytes) == (
        first.config, first.chain_id, first.size_bytes,
    )  # fmt: skip


async def test_pulls_of_one_image_at_the_same_time_share_one(client: Containerd) -> None:
    one, heavy = big_image(b"shared")
    with served_registry() as registry:
        registry.hold("v1", one)
        name = f"{registry.host}/web:v1"
        got = await asyncio.gather(
            *(pull.pull(client, name, one.digest, None, unseen) for _ in range(6))
        )
        assert len(registry.asked(heavy)) == 1
    assert sorted(each.cached for each in got) == [False] + [True] * 5


async def test_nodes_that_share_a_daemon_download_an_image_once(
    client: Containerd, paths: daemon.DaemonPaths
) -> None:
    one, heavy = big_image(b"between nodes")
    async with Containerd(paths.socket, "test-other", runc_root=paths.runc_root) as other:
        await other.ensure_namespace()
        with served_registry() as registry:
            registry.hold("v1", one)
            name = f"{registry.host}/web:v1"
            await pull.pull(client, name, None, None, unseen)
            got = await pull.pull(other, name, None, None, unseen)
            assert len(registry.asked(heavy)) == 1
        assert not got.cached
        assert got.chain_id in await list_snapshots(other)
        await pull.remove_image(other, name, one.digest)
        assert await list_snapshots(other) == []
        assert await pull.image_present(client, name, one.digest)
        await other.remove_namespace()


async def test_an_index_gives_the_manifest_of_this_machine(client: Containerd) -> None:
    both = index({"arm64": _for("arm64"), "amd64": _for("amd64")})
    with served_registry() as registry:
        registry.hold("v1", both)
        got = await pull.pull(client, f"{registry.host}/web:v1", None, None, unseen)
        assert await resolve(f"{registry.host}/web:v1", None) == both.digest
    assert got.digest == both.digest
    assert got.config.cmd == ("/amd64",)


async def test_an_index_without_this_machine_is_final(client: Containerd) -> None:
    with served_registry() as registry:
        registry.hold("v1", index({"s390x": _for("s390x")}))
        with pytest.raises(PullFailed, match="nothing for linux/amd64") as told:
            await pull.pull(client, f"{registry.host}/web:v1", None, None, unseen)
    assert told.value.final


async def test_basic_credentials_open_a_real_registry(client: Containerd, tmp_path: Path) -> None:
    with local_registry(tmp_path, password=True) as url:
        push(url, "team/web", "v1", server_image("v1"), (USER, PASSWORD))
        name = url.removeprefix("http://") + "/team/web:v1"
        got = await pull.pull(client, name, None, f"{USER}:{PASSWORD}", unseen)
        assert not got.cached
        for wrong in (None, f"{USER}:wrong", "a-token"):
            with pytest.raises(PullFailed, match="not authorized") as told:
                await resolve(name, wrong)
            assert told.value.final


async def test_bearer_tokens_are_fetched_with_the_credentials(client: Containerd) -> None:
    with served_registry(auth="bearer") as registry:
        registry.hold("v1", server_image("v1"))
        name = f"{registry.host}/team/web:v1"
        await pull.pull(client, name, None, f"{USER}:{PASSWORD}", unseen)
        assert registry.asked("/token") == [("GET", "repository:team/web:pull")]
        registry.tokens.add("ready-made")
        assert await resolve(name, "ready-made")
        with pytest.raises(PullFailed) as told:
            await resolve(name, "made-up")
        assert told.value.final


async def test_a_token_that_expires_on_the_way_is_fetched_anew(client: Containerd) -> None:
    one = server_image("v1")
    with served_registry(auth="bearer") as registry:
        registry.hold("v1", one)

        def expire(_done: int, total: int | None) -> None:
            if total is None:
                registry.tokens.clear()

        await pull.pull(client, f"{registry.host}/web:v1", None, f"{USER}:{PASSWORD}", expire)
        assert len(registry.asked("/token")) == 2


@pytest.mark.parametrize("status", [403, 404])
async def test_a_registry_that_says_no_is_final(client: Containerd, status: int) -> None:
    with served_registry() as registry:
        registry.hold("v1", server_image("v1"))
        registry.statuses["/manifests/v1"] = [status] * 9
        with pytest.raises(PullFailed, match="said the registry") as told:
            await pull.pull(client, f"{registry.host}/web:v1", None, None, unseen)
    assert told.value.final


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_registry_that_stumbles_is_not_final(client: Containerd, status: int) -> None:
    with served_registry() as registry:
        registry.hold("v1", server_image("v1"))
        registry.statuses["/manifests/v1"] = [status] * 9
        with pytest.raises(PullFailed) as told:
            await pull.pull(client, f"{registry.host}/web:v1", None, None, unseen)
    assert not told.value.final


async def test_a_registry_that_is_not_there_is_not_final(client: Containerd) -> None:
    with served_registry() as registry:
        name = f"{registry.host}/web:v1"
    with pytest.raises(PullFailed, match="does not answer") as told:
        await pull.pull(client, name, None, None, unseen)
    assert not told.value.final


async def test_a_tampered_blob_is_refused_and_not_kept(client: Containerd) -> None:
    one, heavy = big_image(b"tampered")
    with served_registry() as registry:
        registry.hold("v1", one)
        registry.tampered = {heavy}
        name = f"{registry.host}/web:v1"
        with pytest.raises(PullFailed, match=heavy):
            await pull.pull(client, name, None, None, unseen)
        assert heavy not in await blobs(client)
        ingests = await client.call(CONTENT_INGESTS, content_pb2.ListStatusesRequest())
        assert not ingests.statuses
        registry.tampered = set()
        assert not (await pull.pull(client, name, None, None, unseen)).cached


async def test_a_tampered_manifest_is_refused(client: Containerd) -> None:
    one = server_image("v1")
    with served_registry() as registry:
        registry.hold("v1", one)
        registry.tampered = {one.digest}
        with pytest.raises(PullFailed, match="where sha256:"):
            await pull.pull(client, f"{registry.host}/web:v1", one.digest, None, unseen)


async def test_a_layer_that_is_not_what_the_config_says_is_refused(client: Containerd) -> None:
    blob, _ = layer([File("a", b"a")])
    _, other = layer([File("b", b"b")])
    with served_registry() as registry:
        registry.hold("v1", image([(blob, other)], {"Cmd": ["/a"]}))
        with pytest.raises(PullFailed, match="unpacks to"):
            await pull.pull(client, f"{registry.host}/web:v1", None, None, unseen)
    assert await list_snapshots(client) == []


@pytest.mark.parametrize("ranges", [True, False])
async def test_a_download_that_breaks_off_goes_on_where_it_broke(
    client: Containerd, ranges: bool
) -> None:
    one, heavy = big_image(b"cut" + bytes([ranges]))
    with served_registry(ranges=ranges) as registry:
        registry.hold("v1", one)
        registry.cut = {heavy: 2 << 20}
        got = await pull.pull(client, f"{registry.host}/web:v1", None, None, unseen)
        first, second = registry.asked(heavy)
    assert not got.cached
    assert first == ("GET", "")
    assert second[1].startswith("bytes=")
    assert int(second[1][6:-1]) >= 1 << 20


async def test_an_image_goes_with_all_that_only_it_used(
    client: Containerd, registry: str, image: Image
) -> None:
    name = f"{registry}/web:v1"
    await pull.pull(client, name, None, None, unseen)
    await pull.pin_image(client, name, image.digest, "web-k3x9q1")

    assert not await pull.remove_image(client, name, image.digest)
    (record,) = await pull.list_images(client)
    assert (record.image, record.digest, record.pins) == (name, image.digest, ("web-k3x9q1",))

    await pull.unpin_image(client, name, image.digest, "web-k3x9q1")
    assert await pull.remove_image(client, name, image.digest)
    assert await pull.remove_image(client, name, image.digest)
    assert not await pull.image_present(client, name, image.digest)
    assert await blobs(client) == set()
    assert await list_snapshots(client) == []


def _for(arch: str) -> Image:
    return image([layer([File(arch, arch.encode())])], {"Cmd": [f"/{arch}"]}, arch)
