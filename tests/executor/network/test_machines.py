"""Nodes on machines of their own: tunnels, uplinks and rules, against the kernel of a lab."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from reconciler.executor.containerd import network
from reconciler.executor.containerd import network_namespace as namespace
from reconciler.executor.containerd.network import Vxlan
from tests.executor.network.world import CUT_S, World, arrives_as, connection, gets_through
from tests.machines.lab import OUTSIDE

pytestmark = pytest.mark.containers

BODY = os.urandom(1_000_000)


def test_a_megabyte_passes_between_containers_of_two_machines_unmasked(world: World) -> None:
    world.up(1, 2)
    web, api = world.container(1), world.container(2)
    assert arrives_as(web, api, "10.77.2.10") == "10.77.1.10"
    for from_, to, address in ((web, api, "10.77.2.10"), (api, web, "10.77.1.10")):
        with connection(from_, to, address) as carry:
            assert carry(BODY) == BODY


def test_what_fills_a_link_fits_the_tunnel_whole_and_a_smaller_underlay_is_followed(
    world: World,
) -> None:
    for mtu in (1500, 1400):
        for number in (1, 2):
            world.lab.run(number, ["ip", "link", "set", "eth0", "mtu", str(mtu)])
        world.up(1, 2)
        alloc = f"web-{mtu:06}"
        web, api = world.container(1, alloc), world.container(2, alloc)
        links = subprocess.run(
            ["ip", "-n", Path(web).name, "link", "show", "eth0"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert f"mtu {mtu - 50} " in links
        with connection(web, api, "10.77.2.10") as carry:
            assert carry(BODY) == BODY
        counted = world.lab.run(1, ["nstat", "-asz", "IpFragCreates"]).stdout.splitlines()[-1]
        assert counted.split()[:2] == ["IpFragCreates", "0"]
        for number in (1, 2):
            world.on(number, network.remove_container(world.nodes[number], alloc))


def test_the_tunnels_socket_stays_in_the_machines_own_namespace(world: World) -> None:
    world.up(1)
    in_node = ["nsenter", f"--net={world.nodes[1].node_path}", "cat", "/proc/net/udp"]
    assert ":12B5 " in world.lab.run(1, ["cat", "/proc/net/udp"]).stdout
    assert ":12B5 " not in world.lab.run(1, in_node).stdout


def test_a_machine_reaches_containers_of_all_nodes_names_and_virtual_addresses(
    world: World,
) -> None:
    world.up(1, 2)
    web, machine = world.container(2), world.lab.machine(1).netns
    one, two = world.nodes[1].node_path, world.nodes[2].node_path
    assert arrives_as(machine, web, "10.77.2.10") == "172.31.78.1"
    assert arrives_as(machine, one, "10.77.1.1", 53) == "172.31.78.1"
    assert gets_through(machine, one, "10.77.1.1")
    assert arrives_as(machine, one, "10.97.3.4", 80) == "172.31.78.1"
    assert arrives_as(web, two, "10.97.3.4", 80) == "10.77.2.10"
    assert arrives_as(one, web, "10.77.2.10") == "172.31.77.1"


def test_containers_reach_the_outside_as_their_machine_and_are_not_reached_from_there(
    world: World,
) -> None:
    world.up(1, 2)
    web, hub = world.container(1), world.lab.machine(0).netns
    for inside in (web, world.nodes[1].node_path):
        assert arrives_as(inside, hub, OUTSIDE) == world.hosts[1]
    assert arrives_as(web, world.lab.machine(2).netns, world.hosts[2]) == world.hosts[1]
    assert arrives_as(web, world.lab.machine(1).netns, world.hosts[1]) == "10.77.1.10"
    way_in = ["ip", "route", "add", "10.77.1.0/24", "via", world.hosts[1]]
    assert world.lab.run(0, way_in).returncode == 0
    assert not gets_through(hub, web, "10.77.1.10", CUT_S)
    world.lab.run(1, ["nft", "flush", "chain", "ip", world.nodes[1].table, "inward"])
    assert gets_through(hub, web, "10.77.1.10")


def test_peers_come_and_go_while_traffic_flows(world: World) -> None:
    world.up(1, 2)
    web, api = world.container(1), world.container(2)
    with connection(web, api, "10.77.2.10") as carry:
        assert carry(BODY) == BODY
        world.on(3, network.ensure_node(world.nodes[3]))
        world.on(1, network.ensure_node(world.nodes[1]))
        for number in (1, 2, 3):
            world.peers(number, 1, 2, 3)
            assert carry(BODY) == BODY
        third = world.container(3)
        assert arrives_as(web, third, "10.77.3.10") == "10.77.1.10"
        assert arrives_as(world.lab.machine(2).netns, third, "10.77.3.10") == "172.31.78.2"
        for number in (1, 2):
            world.peers(number, 1, 2)
            assert carry(BODY) == BODY
        assert not gets_through(web, third, "10.77.3.10", CUT_S)
    shown = world.lab.run(1, ["ip", "-n", world.nodes[1].node_name, "route"]).stdout
    assert "10.77.3.0/24" not in shown
    assert "172.31.78.3" not in shown
    entries = world.lab.run(1, ["bridge", "-n", world.nodes[1].node_name, "fdb"]).stdout
    assert world.hosts[2] in entries
    assert world.hosts[3] not in entries


def test_a_node_that_comes_back_with_another_address_is_reached_there(world: World) -> None:
    world.up(1, 2)
    web, api = world.container(1), world.container(2)
    moved = f"{world.lab.subnet}.77"
    for line in (
        "ip addr flush dev eth0",
        f"ip addr add {moved}/24 dev eth0",
        f"ip route add default via {world.lab.subnet}.254",
    ):
        assert world.lab.run(2, line.split()).returncode == 0
    world.hosts[2] = moved
    world.nodes[2] = replace(world.nodes[2], overlay=Vxlan(moved))
    world.up(1, 2)
    assert arrives_as(web, api, "10.77.2.10") == "10.77.1.10"
    assert arrives_as(api, web, "10.77.1.10") == "10.77.2.10"


def test_the_tunnel_is_deaf_to_who_is_no_peer(world: World) -> None:
    world.up(1, 2)
    web, two = world.container(1), world.nodes[2].node_path
    assert gets_through(two, web, "10.77.1.10")
    world.peers(1)
    assert not gets_through(two, web, "10.77.1.10", CUT_S)
    world.lab.run(1, ["nft", "flush", "chain", "ip", world.nodes[1].table, "tunnel"])
    assert gets_through(two, web, "10.77.1.10")


def test_a_partition_of_the_machines_cuts_the_overlay_until_it_heals(world: World) -> None:
    world.up(1, 2, 3)
    web, api, third = world.container(1), world.container(2), world.container(3)
    world.lab.partition({1, 2}, {3})
    assert not gets_through(web, third, "10.77.3.10", CUT_S)
    assert not gets_through(third, web, "10.77.1.10", CUT_S)
    assert gets_through(web, api, "10.77.2.10")
    world.lab.heal()
    assert arrives_as(third, web, "10.77.1.10") == "10.77.3.10"


def test_a_packet_to_a_node_that_is_not_there_does_not_go_round(world: World) -> None:
    world.up(1)
    for address in ("10.77.9.9", "172.31.78.9"):
        asked = ["ip", "-n", world.nodes[1].node_name, "route", "get", address]
        assert "No route to host" in world.lab.run(1, asked).stderr


def test_strict_reverse_path_filters_let_everything_pass(world: World) -> None:
    world.up(1, 2)
    web, api = world.container(1), world.container(2)
    for number in (1, 2):
        node = world.nodes[number]
        for name in (
            world.lab.machine(number).name,
            node.node_name,
            node.container_name("web-aaaaaa"),
        ):
            namespace.write_setting(name, "net/ipv4/conf/all/rp_filter", 1)
    machine = world.lab.machine(1).netns
    assert arrives_as(web, api, "10.77.2.10") == "10.77.1.10"
    assert arrives_as(machine, api, "10.77.2.10") == "172.31.78.1"
    assert arrives_as(machine, web, "10.77.1.10") == "172.31.78.1"
    assert arrives_as(web, world.lab.machine(0).netns, OUTSIDE) == world.hosts[1]
    assert arrives_as(web, world.nodes[1].node_path, "10.97.3.4", 80) == "10.77.1.10"
