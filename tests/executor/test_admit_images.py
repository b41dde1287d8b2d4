"""Admission: which digest an image stands for, and who is asked about it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from reconciler.executor.admit import Admitted
from reconciler.executor.resolve import AT_ONCE, known_digest, resolve_images
from reconciler.fsm.state import State
from tests.executor.admit_desk import Desk, desk, one, opened, reader, registry
from tests.images.registry import PASSWORD, USER, free_port, local_registry
from tests.plan.cluster import digest, service, three_nodes

__all__ = ["desk", "reader", "registry"]
pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_moved_tag_counts_only_where_the_spec_is_new_or_asks_always(desk: Desk):
    desk.push("moving", "first")
    plain = one("plain", f"{desk.host}/moving:v1")
    always = one("always", f"{desk.host}/moving:v1", 'pull = "always"')
    await desk.deploy(plain + always)
    moved = desk.push("moving", "second")
    admitted = await desk.admit(plain + always)
    assert isinstance(admitted, Admitted)
    assert [(ch.service, ch.digest) for ch in admitted.start.changes] == [("always", moved)]


async def test_going_back_to_an_earlier_text_asks_no_registry(desk: Desk):
    first = desk.push("back", "first")
    text = one("web", f"{desk.host}/back:v1")
    await desk.deploy(text)
    desk.push("back", "second")
    await desk.deploy(one("web", f"{desk.host}/back:v1", 'user = "1"'))
    desk.asked.clear()
    admitted = await desk.admit(text)
    assert isinstance(admitted, Admitted)
    assert admitted.start.changes[0].digest == first
    assert desk.asked == []


async def test_a_registry_behind_a_password_is_asked_with_the_secret(
    desk: Desk, tmp_path: Path
):
    with local_registry(tmp_path, password=True) as url:
        desk.registry = url
        digest = desk.push("private", "x", (USER, PASSWORD))
        desk.secret("reg", f"{USER}:{PASSWORD}")
        text = one("web", f"{desk.host}/private:v1", 'registry_auth = "reg"')
        admitted = await desk.admit(text)
        assert isinstance(admitted, Admitted)
        assert admitted.start.changes[0].digest == digest
        assert admitted.images[0].registry_auth == "reg"
        [(line, column, message)] = await desk.refused(one("web", f"{desk.host}/private:v1"))
        assert (line, column) == (2, 3)
        assert f"the image {desk.host}/private:v1 cannot be resolved: not authorized" in message


async def test_a_silent_registry_leaves_the_last_digest_with_a_warning(
    desk: Desk, tmp_path: Path
):
    with local_registry(tmp_path) as url:
        desk.registry = url
        digest = desk.push("web", "x")
        name = f"{desk.host}/web:v1"
        await desk.deploy(one("web", name))
    admitted = await desk.admit(one("web", name, 'user = "1"'))
    assert isinstance(admitted, Admitted)
    assert admitted.start.changes[0].digest == digest
    [warning] = admitted.start.warnings
    assert f"{name} could not be looked up" in warning


async def test_an_image_that_nobody_can_say_anything_about_is_refused_at_its_place(desk: Desk):
    name = f"127.0.0.1:{free_port()}/web:v1"
    [(line, column, message)] = await desk.refused(one("web", name))
    assert (line, column) == (2, 3)
    assert f"the image {name} cannot be resolved: " in message
    assert "does not answer" in message


async def test_a_tag_that_the_registry_denies_is_refused_though_one_is_known(desk: Desk):
    digest = desk.push("gone", "x")
    name = f"{desk.host}/gone:v1"
    await desk.deploy(one("web", name))
    url = f"{desk.registry}/v2/gone/manifests/{digest}"
    async with httpx.AsyncClient(trust_env=False) as client:
        (await client.delete(url)).raise_for_status()
    [(_, _, message)] = await desk.refused(one("web", name, 'user = "1"'))
    assert "not found" in message


async def test_of_two_digests_of_one_spec_the_live_one_is_known():
    cluster = three_nodes()
    cluster.deploy(service("web"))
    cluster.deploy(service("web"), build=2)
    assert known_digest(service("web"), cluster.state) == digest(service("web"), 2)
    assert known_digest(service("web", user="1"), cluster.state) == ""
    assert known_digest(service("web", pull="always"), cluster.state) == ""


# -- many questions at once ----------------------------------------------------------------


async def test_registries_are_asked_in_parallel_within_a_bound_and_once_an_image():
    now, most, asked = 0, 0, []
    full = asyncio.Event()

    async def answering(name: str, auth: str | None) -> str:
        nonlocal now, most
        asked.append(name)
        now += 1
        most = max(most, now)
        if now == AT_ONCE:
            for _ in range(100):  # turns of the loop, in which any further one would begin
                await asyncio.sleep(0)
            full.set()
        await full.wait()
        now -= 1
        return "sha256:" + "2" * 64

    specs = [service(f"s{n}", image=f"r.example.com/i{n // 2}:v1") for n in range(80)]
    resolved = await resolve_images(specs, State(), answering, opened)
    assert len(resolved.digests) == 80
    assert most == AT_ONCE
    assert len(asked) == 40


async def test_a_registry_that_never_answers_costs_no_more_than_the_deadline():
    ended = asyncio.Event()

    async def silent(name: str, auth: str | None) -> str:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    resolved = await resolve_images([service("web")], State(), silent, opened, deadline_s=0.05)
    assert [one.reason for one in resolved.unresolved] == ["no answer within 0.05 s"]
    assert ended.is_set()
