"""Nodes' and containers' namespaces, against the kernel; sockets stand for the containers."""

import asyncio
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from reconciler.executor.containerd import network
from reconciler.executor.containerd.network import Layout, NetworkFailed, socket_in

pytestmark = pytest.mark.containers

DEADLINE_S = 20.0


@pytest.fixture
async def tag() -> AsyncIterator[str]:
    name = f"{os.getpid() & 0xFFFFFFFF:08x}"
    await network.sweep(name)
    yield name
    await network.sweep(name)


@pytest.fixture
async def nodes(tag: str) -> tuple[Layout, Layout]:
    layouts = (Layout(tag, "node-1", 1, (2,)), Layout(tag, "node-2", 2, (1,)))
    await asyncio.gather(*(network.ensure_node(layout) for layout in layouts))
    return layouts


def listen(netns: str, address: str, port: int) -> socket.socket:
    server = socket_in(netns, socket.AF_INET, socket.SOCK_STREAM)
    server.bind((address, port))
    server.listen()
    return server


def reached_from(netns: str, address: str, port: int, timeout_s: float = DEADLINE_S) -> str:
    """The address as which a caller inside `netns` arrives there."""
    with closing(socket_in(netns, socket.AF_INET, socket.SOCK_STREAM)) as client:
        client.settimeout(timeout_s)
        client.connect((address, port))
        return str(client.getsockname()[0])


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


def touch(path: str) -> None:
    Path(path).touch()


def spaces_of(tag: str) -> set[str]:
    return {path.name for path in Path("/run/netns").glob(f"mill-{tag}-*")}


def host_view(tags: tuple[str, ...]) -> tuple[list[str], str]:
    """What a sweep gives back: mounts that carry a tag, and the host's links, routes and rules."""
    mounts = [
        line.split()[4]
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if any(tag in line for tag in tags)
    ]
    shown = (
        ip(*what)
        for what in (["-br", "link"], ["-br", "addr"], ["route", "show", "table", "all"], ["rule"])
    )
    return sorted(mounts), "".join(shown) + Path("/proc/sys/net/ipv4/ip_forward").read_text()


async def test_containers_of_two_nodes_reach_each_other_unmasked(
    nodes: tuple[Layout, Layout],
) -> None:
    one, two = nodes
    web = await network.ensure_container(one, "web-aaaaaa", "10.77.1.10")
    api = await network.ensure_container(two, "api-bbbbbb", "10.77.2.10")
    with closing(listen(api, "0.0.0.0", 80)) as server:
        assert reached_from(web, "10.77.2.10", 80) == "10.77.1.10"
        assert server.accept()[1][0] == "10.77.1.10"


async def test_a_node_reaches_the_allocations_of_all_nodes(nodes: tuple[Layout, Layout]) -> None:
    one, two = nodes
    web = await network.ensure_container(one, "web-aaaaaa", "10.77.1.10")
    with closing(listen(web, "0.0.0.0", 80)):
        assert reached_from(one.node_path, "10.77.1.10", 80) == "10.77.1.1"
        assert reached_from(two.node_path, "10.77.1.10", 80) == "172.31.77.2"


async def test_a_virtual_address_is_answered_by_the_containers_own_node(
    nodes: tuple[Layout, Layout],
) -> None:
    for layout, address in zip(nodes, ("10.77.1.10", "10.77.2.10"), strict=True):
        inside = await network.ensure_container(layout, "web-aaaaaa", address)
        with closing(listen(layout.node_path, "10.97.3.4", 8080)) as server:
            assert reached_from(inside, "10.97.3.4", 8080) == address
            assert server.accept()[1][0] == address


async def test_every_step_may_run_again_under_open_connections(
    nodes: tuple[Layout, Layout],
) -> None:
    one, two = nodes
    web = await network.ensure_container(one, "web-aaaaaa", "10.77.1.10")
    api = await network.ensure_container(two, "api-bbbbbb", "10.77.2.10")
    with (
        closing(listen(api, "0.0.0.0", 80)) as server,
        closing(socket_in(web, socket.AF_INET, socket.SOCK_STREAM)) as client,
    ):
        client.settimeout(DEADLINE_S)
        client.connect(("10.77.2.10", 80))
        accepted = server.accept()[0]
        await asyncio.gather(
            *(network.ensure_node(layout) for layout in nodes),
            *(network.ensure_container(one, "web-aaaaaa", "10.77.1.10") for _ in range(3)),
        )
        client.sendall(b"still here")
        assert accepted.recv(10) == b"still here"
        accepted.close()
    assert await network.list_containers(one) == ["web-aaaaaa"]


async def test_a_node_whose_link_is_down_is_cut_off_until_it_is_up(
    nodes: tuple[Layout, Layout],
) -> None:
    one, two = nodes
    web = await network.ensure_container(one, "web-aaaaaa", "10.77.1.10")
    with closing(listen(web, "0.0.0.0", 80)):
        await network.link_down(one)
        with pytest.raises(OSError, match=r"timed out|No route"):
            reached_from(two.node_path, "10.77.1.10", 80, timeout_s=0.3)
        assert reached_from(one.node_path, "10.77.1.10", 80)
        await network.link_up(one)
        assert reached_from(two.node_path, "10.77.1.10", 80) == "172.31.77.2"


async def test_an_address_serves_its_next_allocation_at_once(nodes: tuple[Layout, Layout]) -> None:
    one, two = nodes
    for alloc in ("web-aaaaaa", "web-bbbbbb", "web-cccccc"):
        inside = await network.ensure_container(one, alloc, "10.77.1.10")
        with closing(listen(inside, "0.0.0.0", 80)):
            assert reached_from(two.node_path, "10.77.1.10", 80)
        await network.remove_container(one, alloc)
        await network.remove_container(one, alloc)
    assert await network.list_containers(one) == []


async def test_a_namespace_that_a_socket_keeps_alive_does_not_block_a_new_one(
    nodes: tuple[Layout, Layout],
) -> None:
    one, _ = nodes
    inside = await network.ensure_container(one, "web-aaaaaa", "10.77.1.10")
    with closing(listen(inside, "0.0.0.0", 80)):
        ip("netns", "del", Path(inside).name)
        inside = await network.ensure_container(one, "web-aaaaaa", "10.77.1.10")
        with closing(listen(inside, "0.0.0.0", 81)):
            assert reached_from(one.node_path, "10.77.1.10", 81)


async def test_an_empty_file_left_by_a_reboot_becomes_a_namespace(
    nodes: tuple[Layout, Layout],
) -> None:
    one, _ = nodes
    touch(one.container_path("web-aaaaaa"))
    inside = await network.ensure_container(one, "web-aaaaaa", "10.77.1.10")
    with closing(listen(inside, "10.77.1.10", 80)):
        assert reached_from(one.node_path, "10.77.1.10", 80)


async def test_a_peer_that_left_loses_its_route(nodes: tuple[Layout, Layout]) -> None:
    one, _ = nodes
    await network.ensure_node(Layout(one.tag, one.node, 1, (3,)))
    shown = ip("-n", one.node_name, "route")
    assert "10.77.3.0/24 via 172.31.77.3" in shown
    assert "10.77.2.0/24" not in shown


async def test_remove_node_takes_its_containers_along(nodes: tuple[Layout, Layout]) -> None:
    one, two = nodes
    await network.ensure_container(one, "web-aaaaaa", "10.77.1.10")
    await network.ensure_container(two, "api-bbbbbb", "10.77.2.10")
    await network.remove_node(one)
    await network.remove_node(one)
    assert spaces_of(one.tag) == {one.hub_name, two.node_name, two.container_name("api-bbbbbb")}


async def test_sweep_removes_one_tag_and_leaves_the_host_as_it_was(
    tag: str, tmp_path: Path
) -> None:
    other = Layout(f"{tag[1:]}x", "node-1", 1)
    try:
        await network.ensure_container(await _ensured(other), "web-aaaaaa", "10.77.1.10")
        before = host_view((tag, other.tag))
        layout = await _ensured(Layout(tag, "node-1", 1))
        inside = await network.ensure_container(layout, "web-aaaaaa", "10.77.1.10")
        kept = tmp_path / f"mill-{tag}" / "host"
        await network.keep_host_namespace(kept)
        with closing(listen(inside, "0.0.0.0", 80)):
            removed = await network.sweep(tag)
        assert set(removed) == {
            layout.hub_name, layout.node_name, Path(inside).name, str(kept)
        }  # fmt: skip
        assert host_view((tag, other.tag)) == before
        assert spaces_of(tag) == set()
        assert await network.sweep(tag) == ()
        assert await network.list_containers(other) == ["web-aaaaaa"]
    finally:
        await network.sweep(other.tag)


async def _ensured(layout: Layout) -> Layout:
    await network.ensure_node(layout)
    return layout


async def test_the_kept_host_namespace_is_where_sockets_of_the_host_are_made(
    tmp_path: Path,
) -> None:
    kept = tmp_path / "host"
    try:
        await network.keep_host_namespace(kept)
        await network.keep_host_namespace(kept)
        with (
            closing(listen(str(kept), "127.0.0.1", 0)) as server,
            closing(socket.create_connection(server.getsockname(), timeout=DEADLINE_S)),
        ):
            assert server.accept()[1][0] == "127.0.0.1"
    finally:
        await network.remove_host_namespace(kept)
        await network.remove_host_namespace(kept)
    assert not kept.exists()


def test_a_socket_in_no_namespace_is_refused_by_its_path() -> None:
    with pytest.raises(NetworkFailed, match="No such file") as caught:
        socket_in("/run/netns/mill-none", socket.AF_INET, socket.SOCK_STREAM)
    assert caught.value.at == "/run/netns/mill-none"


async def test_a_failing_step_names_the_line_and_the_namespace(tag: str) -> None:
    layout = Layout(tag, "node-1", 1)
    await network.ensure_hub(layout)
    with pytest.raises(NetworkFailed, match=f"link set {layout.hub_link} down") as caught:
        await network.link_down(layout)
    assert caught.value.at == layout.hub_name
