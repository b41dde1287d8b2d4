"""The lab itself: its machines reach each other until they are cut, and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from reconciler.executor.containerd.network_namespace import socket_in
from tests.machines import lab as labs
from tests.machines.lab import OUTSIDE, Lab

pytestmark = pytest.mark.containers

DEADLINE_S = 20.0
CUT_S = 0.5  # that long nothing arrives; a cut that let a frame through would be seen at once


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(3) as made:
        yield made


def reaches(lab: Lab, from_: int, to: int, timeout_s: float = DEADLINE_S) -> bool:
    """Whether a datagram arrives, one way; it is sent again and again meanwhile."""
    with (
        closing(socket_in(lab.machine(to).netns, socket.AF_INET, socket.SOCK_DGRAM)) as server,
        closing(socket_in(lab.machine(from_).netns, socket.AF_INET, socket.SOCK_DGRAM)) as client,
    ):
        server.bind((lab.machine(to).address, 0))
        server.settimeout(0.1)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # "no route" where no neighbour answered, or silence
                client.sendto(b"here", server.getsockname())
                return server.recv(10) == b"here"
        return False


def cut(lab: Lab, from_: int, to: int) -> bool:
    return not reaches(lab, from_, to, CUT_S)


def connected(lab: Lab, from_: int, to: int) -> tuple[socket.socket, socket.socket]:
    with closing(socket_in(lab.machine(to).netns, socket.AF_INET, socket.SOCK_STREAM)) as server:
        server.bind((lab.machine(to).address, 0))
        server.listen()
        client = socket_in(lab.machine(from_).netns, socket.AF_INET, socket.SOCK_STREAM)
        client.settimeout(DEADLINE_S)
        client.connect(server.getsockname())
        accepted = server.accept()[0]
        accepted.settimeout(DEADLINE_S)
        return client, accepted


def received(sock: socket.socket, count: int) -> bytes:
    got = bytearray()
    while len(got) < count and (more := sock.recv(count - len(got))):
        got += more
    return bytes(got)


def test_machines_reach_each_other_and_the_outside_over_networks_of_their_own(lab: Lab) -> None:
    assert all(reaches(lab, one, two) for one in range(4) for two in range(4) if one != two)
    assert lab.run(1, ["ip", "-br", "link"]).stdout.split()[0] == "lo"
    assert Path("/sys/fs/cgroup/cgroup.controllers").exists() is (
        lab.run(1, ["test", "-e", "/sys/fs/cgroup/cgroup.controllers"]).returncode == 0
    )
    shown = lab.run(1, ["ip", "route", "get", OUTSIDE]).stdout
    assert f"via {lab.subnet}.254" in shown


def test_two_labs_do_not_see_each_other(lab: Lab) -> None:
    with Lab(1) as other:
        assert reaches(other, 1, 0)
        assert other.machine(1).netns != lab.machine(1).netns
        assert lab.run(1, ["ip", "-json", "neigh"]).returncode == 0
    assert reaches(lab, 1, 2)


def test_a_partition_cuts_both_ways_and_open_connections_until_it_heals(lab: Lab) -> None:
    client, accepted = connected(lab, 1, 3)
    with closing(client), closing(accepted):
        lab.partition({1, 2}, {3})
        client.sendall(b"late")
        assert cut(lab, 1, 3)
        assert cut(lab, 3, 2)
        assert reaches(lab, 1, 2)
        assert reaches(lab, 3, 0)
        accepted.setblocking(False)
        with pytest.raises(BlockingIOError):
            accepted.recv(4)
        lab.heal()
        accepted.settimeout(DEADLINE_S)
        assert received(accepted, 4) == b"late"
    assert reaches(lab, 3, 2)


def test_an_isolated_machine_reaches_nobody(lab: Lab) -> None:
    assert reaches(lab, 2, 1)
    lab.isolate(2)
    assert all(cut(lab, 2, other) and cut(lab, other, 2) for other in (0, 1))
    assert reaches(lab, 1, 3)
    lab.heal()
    assert reaches(lab, 2, 0)


def test_one_way_drops_one_direction_only(lab: Lab) -> None:
    lab.one_way(1, 2)
    assert cut(lab, 1, 2)
    assert reaches(lab, 2, 1)
    assert reaches(lab, 1, 3)


def test_a_delay_holds_everything_back_and_loses_nothing(lab: Lab) -> None:
    lab.delay(1, 80)
    for from_, to in ((1, 2), (2, 1)):
        client, accepted = connected(lab, from_, to)
        with closing(client), closing(accepted):
            began = time.monotonic()
            client.sendall(b"ping")
            assert received(accepted, 4) == b"ping"
            assert time.monotonic() - began >= 0.079
            body = os.urandom(300_000)
            accepted.sendall(body)
            assert received(client, len(body)) == body
    lab.partition({1}, {2})
    assert cut(lab, 1, 2)
    assert reaches(lab, 1, 3)
    lab.heal()
    assert reaches(lab, 1, 2)


def test_the_end_takes_processes_namespaces_and_links_along(tmp_path: Path) -> None:
    before = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True)
    with Lab(2) as lab:
        process = lab.spawn(1, ["sh", "-c", "sleep 600 & echo up; wait"], tmp_path / "log")
        pid = process.pid
        name = lab.machine(1).name
    assert process.returncode == -signal.SIGKILL
    assert not Path(f"/proc/{pid}").exists()
    assert not list(Path("/run/netns").glob(f"mlab-{lab.id}-*"))
    assert not (labs.OWNERS / lab.id).exists()
    after = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True)
    assert after.stdout == before.stdout
    assert name not in Path("/proc/self/mountinfo").read_text()


def test_a_killed_runs_lab_is_swept_and_a_live_ones_is_not(lab: Lab, tmp_path: Path) -> None:
    script = (
        "import sys, os, signal, pathlib\n"
        "from tests.machines.lab import Lab\n"
        "lab = Lab(2).__enter__()\n"
        "print(lab.id, lab.spawn(1, ['sleep', '600'], pathlib.Path(sys.argv[1])).pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "log")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    id_, pid = done.stdout.split()
    assert Path(f"/proc/{pid}").exists()
    assert id_ in labs.sweep()
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()
    assert not list(Path("/run/netns").glob(f"mlab-{id_}-*"))
    assert reaches(lab, 1, 2)


async def test_a_lab_is_also_an_async_context_manager() -> None:
    async with Lab(1) as lab:
        assert reaches(lab, 1, 0)
    assert not Path(lab.machine(1).netns).exists()
