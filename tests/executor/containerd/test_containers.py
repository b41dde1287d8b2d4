"""Real containers: made, limited, stopped, found again, removed."""

import asyncio
import os
from pathlib import Path

import pytest

from reconciler.executor.containerd import cgroups, containers, watch
from reconciler.executor.containerd.client import Absent, Containerd, RuntimeFailed
from reconciler.executor.containerd.containers import create_and_start, list_all, remove, stop
from reconciler.executor.containerd.probe import exec_probe
from reconciler.executor.containerd.snapshot import list_snapshots
from reconciler.executor.containerd.spec import Bind, Tmpfs
from reconciler.executor.containerd.watch import Exited, OutOfMemory, TaskEvent, wait
from tests.executor.containerd.conftest import CGROUP, Desk, text, until

pytestmark = pytest.mark.containers
DEADLINE_S = 60.0


async def test_a_container_runs_says_so_on_both_streams_and_stops(
    client: Containerd, desk: Desk
) -> None:
    spec = desk.spec(labels={"mill.service": "web"})
    pid = await create_and_start(client, spec)

    (state,) = await list_all(client)
    assert (state.id, state.status, state.pid) == ("one", "running", pid)
    assert state.labels["mill.service"] == "web"
    assert await _first_line(spec.stdout) == b"web v1: serving on port 3000\n"
    assert await _first_line(spec.stderr) == b"web v1: errors go here\n"

    ended = await stop(client, "one", DEADLINE_S)
    assert ended is not None
    assert ended.code == 0
    (state,) = await list_all(client)
    assert (state.status, state.exit) == ("stopped", ended)


async def test_ordering_a_start_twice_starts_once(client: Containerd, desk: Desk) -> None:
    first = await create_and_start(client, desk.spec())
    assert await create_and_start(client, desk.spec()) == first


async def test_a_stopped_container_starts_anew_in_place(client: Containerd, desk: Desk) -> None:
    first = await create_and_start(client, desk.spec())
    await stop(client, "one", DEADLINE_S)
    second = await create_and_start(client, desk.spec())
    assert second != first
    assert [state.status for state in await list_all(client)] == ["running"]


@pytest.mark.parametrize("code", [0, 3, 255])
async def test_the_exit_code_is_the_programs(client: Containerd, desk: Desk, code: int) -> None:
    await create_and_start(client, desk.spec(command=("exit", str(code))))
    assert (await wait(client, "one")).code == code
    assert (await wait(client, "one")).code == code  # also for who asks afterwards


async def test_a_program_deaf_to_term_is_killed_after_its_grace(
    client: Containerd, desk: Desk
) -> None:
    await create_and_start(client, desk.spec(command=("sleep",)))
    ended = await stop(client, "one", 0.3)
    assert ended is not None
    assert ended.code == 128 + 9


async def test_a_term_right_after_the_start_is_heard(client: Containerd, desk: Desk) -> None:
    for name in ("one", "two", "three"):
        await create_and_start(client, desk.spec(name))
        ended = await stop(client, name, DEADLINE_S)
        assert ended is not None
        assert ended.code == 0


async def test_stopping_what_never_ran_or_never_was_is_fine(client: Containerd, desk: Desk) -> None:
    assert await stop(client, "nobody", 1.0) is None
    await containers.prepare(client, desk.spec())
    assert await stop(client, "one", 1.0) is None
    with pytest.raises(Absent):
        await wait(client, "one")
    await remove(client, "one")
    await remove(client, "one")
    assert await list_all(client) == []


async def test_a_missing_program_is_told_and_leaves_nothing_once_removed(
    client: Containerd, desk: Desk
) -> None:
    with pytest.raises(RuntimeFailed, match="no such file or directory"):
        await create_and_start(client, desk.spec(entrypoint=("/nowhere",)))
    await remove(client, "one")
    assert await list_all(client) == []
    assert [key for key in await list_snapshots(client) if not key.startswith("sha256:")] == []


async def test_ceilings_of_cpu_and_memory_are_written(client: Containerd, desk: Desk) -> None:
    await create_and_start(client, desk.spec(cpu_milli=250, memory_bytes=48 << 20))
    if cgroups.host_cgroup_version() == 1:
        assert _cgroup("memory", "memory.limit_in_bytes") == str(48 << 20)
        quota, period = _cgroup("cpu", "cpu.cfs_quota_us"), _cgroup("cpu", "cpu.cfs_period_us")
    else:
        assert _cgroup("", "memory.max") == str(48 << 20)
        quota, period = _cgroup("", "cpu.max").split()
    assert int(quota) / int(period) == 0.25
    used = await cgroups.usage(client, "one")
    assert used is not None
    assert used.memory_limit_bytes == 48 << 20
    assert 0 < used.memory_bytes < 48 << 20
    assert used.cpu_ns > 0
    assert list(await cgroups.usage_of_all(client)) == ["one"]
    assert await cgroups.usage(client, "nobody") is None


async def test_lack_of_memory_is_told_apart_from_an_exit(client: Containerd, desk: Desk) -> None:
    seen: list[TaskEvent] = []
    following = asyncio.create_task(_follow(client, seen))
    await _until_subscribed(client, desk, seen)
    await create_and_start(client, desk.spec("glutton", command=("eat", "200")))
    await create_and_start(client, desk.spec("killed", command=("exit", "137")))
    eaten = await wait(client, "glutton")
    killed = await wait(client, "killed")
    await until(
        lambda: {Exited("glutton", eaten), Exited("killed", killed)} <= set(seen), "two exits"
    )
    following.cancel()

    assert (eaten.code, killed.code) == (137, 137)
    assert OutOfMemory("glutton") in seen
    assert OutOfMemory("killed") not in seen
    assert cgroups.oom_kills(f"{CGROUP}/glutton") == 1
    assert cgroups.oom_kills(f"{CGROUP}/killed") == 0


async def test_a_child_killed_for_memory_leaves_its_container_running(
    client: Containerd, desk: Desk
) -> None:
    seen: list[TaskEvent] = []
    following = asyncio.create_task(_follow(client, seen))
    await _until_subscribed(client, desk, seen)
    await create_and_start(client, desk.spec(memory_bytes=32 << 20))
    assert await exec_probe(client, "one", ("/server", "eat", "100"), DEADLINE_S) == 128 + 9
    await until(lambda: OutOfMemory("one") in seen, "the kill is told")
    following.cancel()
    assert {state.id: state.status for state in await list_all(client)}["one"] == "running"
    used = await cgroups.usage(client, "one")
    assert used is not None
    assert used.oom_kills == cgroups.oom_kills(f"{CGROUP}/one") == 1


async def test_a_network_namespace_is_joined_with_its_low_ports_free(
    client: Containerd, desk: Desk, netns: str
) -> None:
    pid = await create_and_start(client, desk.spec(netns=netns, user="app", env=("PORT=80",)))
    assert os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat(netns).st_ino
    await until(lambda: _listens(pid, 80), "it listens on port 80")
    await remove(client, "one")


async def test_a_probe_runs_inside_as_the_containers_user(client: Containerd, desk: Desk) -> None:
    spec = desk.spec(user="app", netns="")
    pid = await create_and_start(client, spec)
    status = text(f"/proc/{pid}/status")
    assert "Uid:\t1000\t1000\t1000\t1000" in status
    assert "Groups:\t10 \n" in status
    await until(lambda: _listens(pid), "the server listens")
    assert await exec_probe(client, "one", ("/server", "get", "3000", "/health"), DEADLINE_S) == 0
    assert await exec_probe(client, "one", ("/server", "get", "3001", "/health"), DEADLINE_S) == 1
    assert await exec_probe(client, "one", ("/server", "sleep"), 0.2) is None
    with pytest.raises(RuntimeFailed):
        await exec_probe(client, "one", ("/nowhere",), DEADLINE_S)
    with pytest.raises(Absent):
        await exec_probe(client, "nobody", ("/server",), DEADLINE_S)
    assert [state.status for state in await list_all(client)] == ["running"]


async def test_files_folders_and_names_are_as_ordered(
    client: Containerd, desk: Desk, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("10.77.0.9 db\n")
    spec = desk.spec(
        binds=(Bind(str(hosts), "/etc/hosts"),),
        tmpfs=(Tmpfs("/scratch", 1 << 20),),
        hostname="web-1",
        read_only=True,
        workdir="/tmp",
        env=("PORT=3000", "VERSION=changed"),
    )
    pid = await create_and_start(client, spec)
    root = Path(f"/proc/{pid}/root")
    assert (root / "etc/hosts").read_text() == "10.77.0.9 db\n"
    assert (root / "etc/version").read_text() == "v1\n"
    assert os.readlink(f"/proc/{pid}/cwd") == "/tmp"
    environment = text(f"/proc/{pid}/environ").split("\0")
    assert "VERSION=changed" in environment
    assert "VERSION=v1" not in environment
    mounts = text(f"/proc/{pid}/mounts")
    assert "tmpfs /scratch tmpfs rw,nosuid,nodev,relatime,size=1024k" in mounts
    with pytest.raises(OSError, match="Read-only"):
        (root / "etc/hosts").write_text("x")
    with pytest.raises(OSError, match="Read-only"):
        (root / "new").touch()


async def _first_line(fifo: str) -> bytes:
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    got = b""

    def read() -> bool:
        nonlocal got
        try:
            got += os.read(descriptor, 4096)
        except BlockingIOError:
            return False
        return b"\n" in got

    try:
        await until(read, f"a line in {fifo}")
    finally:
        os.close(descriptor)
    return got


async def _follow(client: Containerd, seen: list[TaskEvent]) -> None:
    async for event in watch.events(client):
        seen.append(event)


async def _until_subscribed(client: Containerd, desk: Desk, seen: list[TaskEvent]) -> None:
    """Until an exit is told: a subscription is not acknowledged."""
    while not seen:
        await create_and_start(client, desk.spec("canary", command=("exit", "0")))
        await wait(client, "canary")
        await asyncio.sleep(0.05)


def _cgroup(controller: str, file: str) -> str:
    return (
        (cgroups.CGROUP_ROOT / controller / f"{CGROUP}/one".lstrip("/") / file).read_text().strip()
    )


def _listens(pid: int, port: int = 3000) -> bool:
    return f" 00000000:{port:04X} " in text(f"/proc/{pid}/net/tcp")
