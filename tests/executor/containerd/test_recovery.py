"""What a crash leaves: agents, daemons and shims that die at any moment, found again or swept."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from reconciler.executor.containerd import containers, daemon, pull
from reconciler.executor.containerd.client import Absent, Containerd
from reconciler.executor.containerd.containers import create_and_start, list_all, remove, stop
from reconciler.executor.containerd.generated import containers_pb2
from reconciler.executor.containerd.rpc import CONTAINER_DELETE
from reconciler.executor.containerd.snapshot import list_snapshots
from reconciler.executor.containerd.watch import wait
from tests.executor.containerd.conftest import Desk, lives, text, there, unseen, until

pytestmark = pytest.mark.containers
DEADLINE_S = 60.0


async def test_a_new_client_finds_what_an_old_one_started(
    client: Containerd, desk: Desk, paths: daemon.DaemonPaths
) -> None:
    pid = await create_and_start(client, desk.spec("runs"))
    await create_and_start(client, desk.spec("ended", command=("exit", "4")))
    await wait(client, "ended")
    await containers.prepare(client, desk.spec("prepared"))
    async with Containerd(paths.socket, client.namespace, runc_root=paths.runc_root) as later:
        found = {state.id: state for state in await list_all(later)}
        assert {name: state.status for name, state in found.items()} == {
            "ended": "stopped", "prepared": "prepared", "runs": "running",
        }  # fmt: skip
        assert found["runs"].pid == pid
        assert found["ended"].exit is not None
        assert found["ended"].exit.code == 4
        assert await containers.sweep(later) == []
        waiting = asyncio.create_task(wait(later, "runs"))
        await stop(later, "runs", DEADLINE_S)
        assert (await waiting).code == 0


async def test_a_task_whose_record_is_gone_is_swept(client: Containerd, desk: Desk) -> None:
    pid = await create_and_start(client, desk.spec())
    gone = containers_pb2.DeleteContainerRequest(id="one")
    await client.call(CONTAINER_DELETE, gone)
    (state,) = await list_all(client)
    assert (state.status, state.recorded) == ("running", False)

    assert await containers.sweep(client) == ["one"]
    assert await list_all(client) == []
    assert not lives(pid)


async def test_a_container_whose_shim_is_killed_is_gone_and_can_be_removed(
    client: Containerd, desk: Desk
) -> None:
    pid = await create_and_start(client, desk.spec())
    waiting = asyncio.create_task(wait(client, "one"))
    (shim,) = _shims(client.namespace)
    os.kill(shim, signal.SIGKILL)
    await asyncio.wait({waiting}, timeout=DEADLINE_S)
    with contextlib.suppress(Absent):  # containerd may have cleared it away first
        assert waiting.result().code == 128 + 9
    await until(lambda: not lives(pid), "its process ended")
    await remove(client, "one")
    await create_and_start(client, desk.spec())
    await remove(client, "one")
    assert await list_all(client) == []


async def test_a_container_outlives_the_removal_of_its_image(
    client: Containerd, desk: Desk, registry: str
) -> None:
    """Its own snapshot, on top of them, holds the image's layers."""
    await containers.prepare(client, desk.spec())
    assert await pull.remove_image(client, f"{registry}/web:v1", desk.image.digest)
    await containers.start(client, "one")
    assert [state.status for state in await list_all(client)] == ["running"]
    await remove(client, "one")
    assert [key for key in await list_snapshots(client) if not key.startswith("sha256:")] == []


async def test_waiting_goes_on_over_a_restart_of_the_daemon(tmp_path: Path, registry: str) -> None:
    """With a daemon of its own, as the others go on using theirs."""
    folder = tmp_path / "daemon"
    first = daemon.start_daemon(folder)
    try:
        assert daemon.start_daemon(folder) == first
        paths = daemon.daemon_paths(folder)
        async with Containerd(paths.socket, "restart", runc_root=paths.runc_root) as client:
            await client.ensure_namespace()
            image = await pull.pull(client, f"{registry}/web:v1", None, None, unseen)
            pid = await create_and_start(client, Desk(tmp_path, image).spec("survivor"))
            waiting = asyncio.create_task(wait(client, "survivor"))
            await asyncio.to_thread(daemon.stop_daemon, folder)
            assert daemon.running_daemon(folder) is None
            assert lives(pid)
            second = await asyncio.to_thread(daemon.start_daemon, folder)
            assert second != first
            assert [state.status for state in await list_all(client)] == ["running"]
            await stop(client, "survivor", DEADLINE_S)
            assert (await asyncio.wait_for(waiting, DEADLINE_S)).code == 0
            await create_and_start(client, Desk(tmp_path, image).spec("left"))
            (address,) = paths.state.glob("*/*/left/address")
            shim_socket = text(str(address)).removeprefix("unix://")
            assert there(shim_socket)
    finally:
        daemon.purge_daemon(folder)
    assert not folder.exists()
    assert not there(shim_socket)
    assert str(folder) not in text("/proc/self/mountinfo")


async def test_after_everything_was_killed_the_same_folder_starts_over(
    tmp_path: Path, registry: str
) -> None:
    folder = tmp_path / "daemon"
    served = daemon.start_daemon(folder)
    try:
        paths = daemon.daemon_paths(folder)
        async with Containerd(paths.socket, "cut", runc_root=paths.runc_root) as client:
            await client.ensure_namespace()
            image = await pull.pull(client, f"{registry}/web:v1", None, None, unseen)
            spec = Desk(tmp_path, image).spec("cut")
            pid = await create_and_start(client, spec)
        for victim in (served, *_shims("cut"), pid):
            os.kill(victim, signal.SIGKILL)
        await until(lambda: not lives(served) and not lives(pid), "all are dead")

        await asyncio.to_thread(daemon.start_daemon, folder)
        async with Containerd(paths.socket, "cut", runc_root=paths.runc_root) as client:
            await containers.sweep(client)
            (state,) = await list_all(client)
            assert (state.id, state.status) in {("cut", "prepared"), ("cut", "stopped")}
            assert (await pull.pull(client, f"{registry}/web:v1", None, None, unseen)).cached
            await create_and_start(client, spec)
            await remove(client, "cut")
            assert await list_all(client) == []
    finally:
        daemon.purge_daemon(folder)


def test_a_folder_too_deep_for_a_socket_gets_it_below_run(tmp_path: Path) -> None:
    folder = tmp_path / ("deep" * 30)
    try:
        pid = daemon.start_daemon(folder)
        paths = daemon.daemon_paths(folder)
        assert paths.socket.parent.parent == Path("/run")
        assert paths.socket.parent.name.startswith("mill-")
        assert daemon.running_daemon(folder) == pid
    finally:
        daemon.purge_daemon(folder)
    assert not paths.socket.parent.exists()
    assert daemon.running_daemon(folder) is None


async def test_a_cancelled_start_is_finished_and_can_be_removed(
    client: Containerd, desk: Desk
) -> None:
    for delay_s in (0.0, 0.005, 0.01, 0.02, 0.04, 0.08):
        starting = asyncio.create_task(create_and_start(client, desk.spec()))
        await asyncio.wait({starting}, timeout=delay_s)
        starting.cancel()
        await asyncio.wait({starting})
        await remove(client, "one")
        await create_and_start(client, desk.spec())
        await remove(client, "one")
    assert await list_all(client) == []


CHURN = """
import asyncio, sys
from pathlib import Path
import msgspec
from reconciler.executor.containerd.client import Containerd
from reconciler.executor.containerd.containers import create_and_start, remove
from reconciler.executor.containerd.spec import ContainerSpec

async def main():
    socket, namespace, runc_root, spec = sys.argv[1:]
    spec = msgspec.json.decode(spec, type=ContainerSpec)
    async with Containerd(Path(socket), namespace, runc_root=Path(runc_root)) as client:
        print("up", flush=True)
        while True:
            await remove(client, spec.id)
            await create_and_start(client, spec)
            await remove(client, spec.id)

asyncio.run(main())
"""


async def test_nothing_remains_of_an_agent_killed_at_any_point(
    client: Containerd, desk: Desk, paths: daemon.DaemonPaths
) -> None:
    spec = msgspec.json.encode(desk.spec("churn")).decode()
    words = [str(paths.socket), client.namespace, str(paths.runc_root), spec]
    for kill in range(8):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CHURN, *words, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        await asyncio.wait_for(child.stdout.readline(), DEADLINE_S)
        # A different moment of the loop's 250 ms each time; what is proved holds at every one.
        await asyncio.wait({asyncio.create_task(child.wait())}, timeout=0.031 * (kill + 1))
        child.kill()
        await child.wait()
        await containers.sweep(client)
        await remove(client, "churn")

    await create_and_start(client, desk.spec("churn"))
    await remove(client, "churn")
    assert await list_all(client) == []
    assert [key for key in await list_snapshots(client) if not key.startswith("sha256:")] == []
    state = paths.state / "io.containerd.runtime.v2.task" / client.namespace
    await until(lambda: not list(state.glob("*")), "no bundle is left")
    await until(lambda: not list((paths.runc_root / client.namespace).glob("*")), "runc forgot it")
    mounts = text("/proc/self/mountinfo")
    assert f"{client.namespace}/churn" not in mounts
    assert not _shims(client.namespace)


def _shims(namespace: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_text().split("\0")
        except OSError:
            continue
        if "containerd-shim" in words[0] and namespace in words:
            found.append(int(entry.parent.name))
    return found
