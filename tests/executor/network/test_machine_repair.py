"""A machine's network is refused, mended and removed as a whole, against the kernel of a lab."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from reconciler.executor.containerd import network
from reconciler.executor.containerd import network_namespace as namespace
from reconciler.executor.containerd.network import Layout, NetworkFailed, Vxlan
from tests.executor.network.world import World, arrives_as, bound, connection
from tests.machines.lab import OUTSIDE

pytestmark = pytest.mark.containers

BODY = os.urandom(1_000_000)


def view(world: World, number: int) -> str:
    """What a machine's own namespace holds: links, addresses, routes, neighbours, rules."""
    shown = (
        ["ip", "-br", "link"], ["ip", "-br", "addr"], ["ip", "route", "show", "table", "all"],
        ["ip", "rule"], ["nft", "list", "ruleset"],
    )  # fmt: skip
    return "\n".join(world.lab.run(number, what).stdout for what in shown)


def test_remove_and_sweep_leave_the_machine_as_it_was(world: World) -> None:
    before = view(world, 1)
    tag = world.nodes[1].tag
    for end in (network.remove_node(world.nodes[1]), network.sweep(tag)):
        world.up(1, 2)
        web = world.container(1)
        assert view(world, 1) != before
        with closing(bound(web, "10.77.1.10")), closing(bound(world.nodes[1].node_path, "0.0.0.0")):
            world.on(1, end)
            assert view(world, 1) == before
        assert not [path.name for path in namespace.NETNS_FOLDER.glob(f"mill-{tag}-c1*")]
        assert not Path(world.nodes[1].node_path).exists()
        world.on(1, network.remove_node(world.nodes[1]))
    world.up(1, 2)
    assert arrives_as(world.container(1), world.container(2), "10.77.2.10") == "10.77.1.10"


def test_a_second_cluster_on_a_machine_is_refused_and_harms_nothing(world: World) -> None:
    world.up(1, 2)
    web, api = world.container(1), world.container(2)
    other = Layout(secrets.token_hex(4), "other", 1, overlay=Vxlan(world.hosts[1]))
    with connection(web, api, "10.77.2.10") as carry:
        try:
            with pytest.raises(NetworkFailed, match=r"routes 10\.77\.0\.0/16 of the cluster"):
                world.on(1, network.ensure_node(other))
        finally:
            world.on(1, network.sweep(other.tag))
        assert carry(BODY) == BODY


def test_an_address_that_the_machine_lacks_is_refused_by_name(world: World) -> None:
    layout = replace(world.nodes[1], overlay=Vxlan("203.0.113.9"))
    with pytest.raises(NetworkFailed, match=r"no link .* 203\.0\.113\.9"):
        world.on(1, network.ensure_node(layout))


def test_a_tunnel_that_is_taken_is_said(world: World) -> None:
    line = f"ip link add other type vxlan id 77 dstport 4789 local {world.hosts[1]}"
    world.lab.run(1, line.split())
    with pytest.raises(NetworkFailed, match="VXLAN 77 on UDP 4789 is taken"):
        world.on(1, network.ensure_node(world.nodes[1]))


def test_a_peer_without_an_address_does_not_keep_the_others_away(world: World) -> None:
    world.up(1, 2)
    world.peers(1)
    hosts = {2: world.hosts[2], 3: "machine-three.example"}
    with pytest.raises(ValueError, match=r"machine-three\.example"):
        world.on(1, network.ensure_peers(world.nodes[1], hosts))
    assert arrives_as(world.container(1), world.container(2), "10.77.2.10") == "10.77.1.10"


def test_a_node_that_gets_another_number_is_told_to_leave_and_then_comes_up(world: World) -> None:
    world.up(1, 2)
    world.nodes[1] = again = replace(world.nodes[1], number=7)
    with pytest.raises(NetworkFailed, match="VXLAN 77 on UDP 4789 is taken") as caught:
        world.on(1, network.ensure_node(again))
    assert "mill leave" in caught.value.hint
    world.on(1, network.sweep(again.tag))
    world.on(1, network.ensure_node(again))
    world.peers(1, 2)
    world.on(2, network.ensure_peers(world.nodes[2], {7: world.hosts[1]}))
    web = world.container(2)
    assert arrives_as(world.lab.machine(1).netns, web, "10.77.2.10") == "172.31.78.7"
    assert arrives_as(again.node_path, web, "10.77.2.10") == "172.31.77.7"


@pytest.mark.parametrize(
    "loss",
    [
        "nft flush ruleset",
        "ip link del {uplink}",
        "ip -n {node} link del uplink",
        "ip -n {node} link del eth0",
        "ip -n {node} link set eth0 down",
        "ip link set {uplink} down",
        "ip route del 10.77.0.0/16",
        "ip -n {node} route flush proto 77",
        "ip -n {node} neigh flush dev eth0 nud permanent",
        "ip -n {node} route del default",
    ],
)
def test_what_is_lost_comes_back_with_the_next_ensure(world: World, loss: str) -> None:
    world.up(1, 2)
    web, api = world.container(1), world.container(2)
    layout = world.nodes[1]
    done = world.lab.run(1, loss.format(uplink=layout.uplink, node=layout.node_name).split())
    assert done.returncode == 0, done.stderr
    world.up(1, 2)
    hub, machine = world.lab.machine(0).netns, world.lab.machine(1).netns
    assert arrives_as(web, api, "10.77.2.10") == "10.77.1.10"
    assert arrives_as(web, hub, OUTSIDE) == world.hosts[1]
    assert arrives_as(machine, api, "10.77.2.10") == "172.31.78.1"


def test_a_kill_before_each_command_is_mended_by_the_next_run(world: World, tmp_path: Path) -> None:
    world.up(2)
    world.peers(2, 1)
    api, hub = world.container(2), world.lab.machine(0).netns
    layout = world.nodes[1]
    script = (
        "import asyncio, sys\n"
        "from reconciler.executor.containerd import network\n"
        "async def main():\n"
        f"    layout = network.{layout!r}\n".replace("overlay=", "overlay=network.")
        + "    await network.ensure_node(layout)\n"
        f"    await network.ensure_peers(layout, {{2: {world.hosts[2]!r}}})\n"
        "asyncio.run(main())\n"
    )
    for program in ("ip", "nft", "bridge"):
        real = shutil.which(program)
        (tmp_path / program).write_text(
            f'#!/bin/sh\necho x >> "$COUNT"\n[ $(wc -l < "$COUNT") = "$LAST" ] && kill -9 $PPID\n'
            f'exec {real} "$@"\n'
        )
        (tmp_path / program).chmod(0o755)
    killed, last = True, 0
    while killed:
        last += 1
        assert last < 50, "the process came to no end"
        count = tmp_path / f"count-{last}"
        argv = ["env", f"PATH={tmp_path}:{os.environ['PATH']}", f"COUNT={count}", f"LAST={last}",
                sys.executable, "-c", script]  # fmt: skip
        done = world.lab.run(1, argv)
        killed = done.returncode == -signal.SIGKILL
        assert killed or done.returncode == 0, done.stderr
        world.on(1, network.ensure_node(layout))
        world.peers(1, 2)
        web = world.container(1)
        assert arrives_as(web, api, "10.77.2.10") == "10.77.1.10"
        assert arrives_as(web, hub, OUTSIDE) == world.hosts[1]
        world.on(1, network.remove_node(layout))
    assert last > 8
