"""The process: one per folder, found again, never taken along, followed by its agent."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from pathlib import Path

import pytest

from reconciler.edge.ads import AdsServer
from reconciler.edge.envoy import LOG_KEPT_BYTES, LOG_LIMIT_BYTES, EnvoyError, EnvoyProcess
from reconciler.edge.resources import ResourceBuilder
from reconciler.edge.table import (
    Cluster,
    EdgeTable,
    Endpoint,
    HostRoutes,
    PathRoute,
    VirtualAddress,
)
from reconciler.errors import Conflict
from tests.edge.backends import Backend, Client, next_address
from tests.edge.conftest import Served


def table_of(backend: Backend) -> EdgeTable:
    return EdgeTable(
        (Cluster("web", (Endpoint(backend.address, backend.port),)),), (),
        (HostRoutes("app.example.com", (PathRoute("/", "web"),)),),
    )


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


async def test_starting_what_runs_changes_nothing_and_another_object_finds_it(
    served: Served,
) -> None:
    pid = served.envoy.pid
    assert await served.envoy.ensure_running() is False
    found = EnvoyProcess(served.envoy.folder)
    assert await found.ensure_running() is False
    assert found.pid == pid
    await found.stop()
    assert served.envoy.pid is None
    assert await served.envoy.ensure_running() is True
    assert served.envoy.pid not in (None, pid)


def test_a_pid_that_now_is_another_process_is_not_taken_for_envoy(tmp_path: Path) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    head, _, rest = Path("/proc/self/stat").read_text().rpartition(")")
    fields = rest.split()
    (tmp_path / "envoy.pid").write_text(f"{boot}{head}) {' '.join(fields)}\n")
    assert EnvoyProcess(tmp_path).pid == os.getpid()
    fields[19] = str(int(fields[19]) - 1)
    (tmp_path / "envoy.pid").write_text(f"{boot}{head}) {' '.join(fields)}\n")
    assert EnvoyProcess(tmp_path).pid is None


async def test_envoy_and_its_traffic_outlive_the_process_that_started_it(
    served: Served, tmp_path: Path
) -> None:
    """The starter is killed with all of its session; Envoy goes on in its own."""
    folder = tmp_path / "other"
    script = textwrap.dedent(f"""
        import asyncio
        from pathlib import Path
        from reconciler.edge.ads import AdsServer
        from reconciler.edge.envoy import EnvoyProcess
        from reconciler.edge.resources import ResourceBuilder
        from reconciler.edge.listeners import Ingress
        from reconciler.edge.table import EdgeTable, HostRoutes, PathRoute

        async def main():
            envoy, ads = EnvoyProcess(Path({str(folder)!r})), AdsServer()
            build = ResourceBuilder(Ingress({served.ingress.address!r}, 0))
            await ads.start(envoy.xds_socket, 1, build.build(EdgeTable()))
            await envoy.ensure_running()
            await envoy.ready(60)
            print("serving", flush=True)
            await asyncio.Event().wait()

        asyncio.run(main())
    """)
    starter = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    envoy = EnvoyProcess(folder)
    try:
        assert starter.stdout is not None
        line = b""
        while b"serving" not in line:
            line = await asyncio.wait_for(starter.stdout.readline(), 60)
            assert line
        pid = envoy.pid
        os.killpg(starter.pid, signal.SIGKILL)
        await starter.wait()
        assert envoy.pid == pid
        await envoy.ready(60)
        assert envoy.pid == pid
    finally:
        await envoy.stop()
    assert envoy.pid is None


async def test_an_agent_that_restarts_costs_no_request_and_envoy_takes_only_what_changed(
    served: Served,
) -> None:
    web, new = await Backend("web").start(), await Backend("new").start()
    await served.publish(table_of(web))
    client = Client(served.ingress.address, served.ingress.http_port, "app.example.com")
    answers: set[tuple[int, str]] = set()
    stop = asyncio.Event()

    async def load() -> None:
        while not stop.is_set():
            answers.add(await client.ask())

    asking = asyncio.create_task(load())
    await served.ads.stop()
    while served.ads.connected:
        await asyncio.sleep(0.01)
    ads, build = AdsServer(), ResourceBuilder(served.ingress, served.builder.certificate)
    try:
        await ads.start(served.envoy.xds_socket, 7, build.build(table_of(web)))
        assert (await ads.publish(7, build.build(table_of(web)), 20)).acked
        assert (await ads.publish(8, build.build(table_of(new)), 20)).acked
        while (200, "new") not in answers:
            await asyncio.sleep(0.01)
        stop.set()
        await asking
        assert answers == {(200, "web"), (200, "new")}
        updates = await served.envoy.admin("/stats?filter=listener_manager.listener_modified")
        assert updates.strip().endswith(": 0")
    finally:
        stop.set()
        await ads.stop()
        await web.kill()
        await new.kill()


async def test_two_agents_cannot_serve_one_envoy(served: Served) -> None:
    other = AdsServer()
    with pytest.raises(Conflict):
        await other.start(served.envoy.xds_socket, 1, {})


async def test_a_folder_of_any_depth_works_and_its_name_is_not_on_the_command_line(
    served: Served, tmp_path: Path
) -> None:
    folder = tmp_path / "node-2" / ("deep" * 30)
    envoy, ads = EnvoyProcess(folder, node="node-2"), AdsServer()
    try:
        await ads.start(envoy.xds_socket, 1, served.builder.build(EdgeTable()))
        await envoy.ensure_running()
        assert (await ads.publish(1, {}, 20)).acked
        assert envoy.pid is not None
        assert "node-2" not in command_line(envoy.pid)
        assert (folder.stat().st_mode & 0o777) == 0o700
        for name in ("envoy.json", "envoy.pid", "envoy.log", "admin.sock"):
            assert (folder / name).stat().st_mode & 0o077 == 0, name
    finally:
        await envoy.stop()
        await ads.stop()


async def test_requests_in_flight_are_counted_and_waiting_connections_are_not(
    served: Served,
) -> None:
    slow = await Backend("web", delay_s=60).start()
    quick = await Backend("web").start()
    addresses = [(slow.address, slow.port), (quick.address, quick.port)]
    await served.publish(table_of(quick))
    client = Client(served.ingress.address, served.ingress.http_port, "app.example.com")
    assert (await client.ask())[0] == 200
    assert await served.envoy.active_requests(addresses) == 0
    await served.publish(table_of(slow))
    asking = asyncio.create_task(client.ask())
    while await served.envoy.active_requests(addresses, ["web"]) != 1:
        await asyncio.sleep(0.01)
    # Draining takes nothing new, and what is in flight still counts.
    draining = Endpoint(slow.address, slow.port, draining=True)
    await served.publish(EdgeTable((Cluster("web", (draining,)),), (), table_of(slow).hosts))
    assert await served.envoy.requests_by_endpoint(addresses) == {(slow.address, slow.port): 1}
    assert (await served.get("app.example.com")).status_code == 503
    await slow.kill()
    assert (await asking)[0] == 503
    assert await served.envoy.active_requests(addresses) == 0
    await quick.kill()


async def test_an_open_connection_to_a_virtual_address_counts_as_a_request(
    served: Served,
) -> None:
    web, vip = await Backend("web").start(), next_address()
    address = VirtualAddress(vip, web.port, "web")
    await served.publish(EdgeTable(table_of(web).clusters, (address,), ()))
    client = Client(vip, web.port, "x")
    assert await client.ask() == (200, "web")
    assert await served.envoy.active_requests([(web.address, web.port)], ["web"]) == 1
    client.close()
    while await served.envoy.active_requests([(web.address, web.port)], ["web"]):
        await asyncio.sleep(0.01)
    await web.kill()


async def test_a_log_that_grew_is_cut_and_its_end_is_kept(served: Served) -> None:
    path = served.envoy.folder / "envoy.log"
    with path.open("ab") as file:
        file.write(b"x" * LOG_LIMIT_BYTES + b"the end\n")
    await served.envoy.ensure_running()
    assert path.stat().st_size == 0
    kept = (served.envoy.folder / "envoy.log.1").read_bytes()
    assert len(kept) == LOG_KEPT_BYTES
    assert kept.endswith(b"the end\n")


async def test_a_namespace_that_does_not_exist_is_told_with_what_was_said(tmp_path: Path) -> None:
    envoy = EnvoyProcess(tmp_path / "edge", str(tmp_path / "no-such-namespace"))

    async def start() -> None:
        await envoy.ensure_running()
        await envoy.ready(20)

    with pytest.raises(EnvoyError) as caught:
        await start()
    assert "no-such-namespace" in caught.value.hint
    assert envoy.pid is None
