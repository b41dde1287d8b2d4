"""What a real container notices of the log process: nothing, while it writes, waits and ends."""

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from reconciler.executor.agent.logs import LogStore
from reconciler.executor.containerd.cgroups import remove_cgroup
from tests.executor.logs.test_logs import ALLOC, DEADLINE_S, processes, until, until_logged

pytestmark = pytest.mark.containers

CONFIG = """
version = 2
root = "{0}/root"
state = "{0}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
address = "{0}/containerd.sock"
[ttrpc]
address = "{0}/ttrpc.sock"
"""
# More than the pipes between it and the log process hold; a failed write ends it with 3.
SCRIPT = """
trap '' PIPE
i=0; while [ $i -lt 40000 ]; do
  echo "line $i ...................................................................." || exit 3
  i=$((i+1))
done
"""


NAMESPACE = f"mill-test-{os.getpid()}"


class Runtime:
    """A containerd of its own, driven by `ctr`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "rootfs"
        (self.root / "bin").mkdir(parents=True)
        shutil.copy(shutil.which("busybox") or "", self.root / "bin")
        config = folder / "config.toml"
        config.write_text(CONFIG.format(folder))
        with (folder / "log").open("w") as log:
            self.daemon = subprocess.Popen(["containerd", "-c", config], stdout=log, stderr=log)

    def ctr(self, *arguments: str) -> str:
        # Every containerd of a machine keeps its containers below the same folder in /run.
        command = ["ctr", "-a", f"{self.folder}/containerd.sock", "-n", NAMESPACE, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=DEADLINE_S, check=True
        ).stdout

    def run(self, name: str, fifo: str, script: str) -> None:
        self.ctr(
            "run", "-d", "--rootfs", "--log-uri", fifo, str(self.root), name,
            "/bin/busybox", "sh", "-c", script,
        )  # fmt: skip

    def task(self, name: str) -> list[str]:
        """Its name, pid and state; empty where there is none."""
        rows = (line.split() for line in self.ctr("tasks", "ls").splitlines())
        return next((row for row in rows if row[0] == name), [])

    def state(self, name: str) -> str:
        return (self.task(name) or ["", "", ""])[2]

    def waits_for_a_reader(self, name: str) -> bool:
        """Whether the container sleeps in a write to its full pipe."""
        return "pipe_write" in Path(f"/proc/{self.task(name)[1]}/wchan").read_text()

    def close(self) -> None:
        for name in self.ctr("containers", "ls", "-q").split():
            if self.state(name) == "RUNNING":
                self.ctr("tasks", "kill", "-s", "SIGKILL", name)
            if self.state(name):
                self.ctr("tasks", "delete", "-f", name)
            self.ctr("containers", "rm", name)
        self.daemon.terminate()
        self.daemon.wait(DEADLINE_S)
        remove_cgroup(f"/{NAMESPACE}")
        shutil.rmtree(f"/run/containerd/runc/{NAMESPACE}", ignore_errors=True)


@pytest.fixture
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    folder = tmp_path_factory.mktemp("ctd")
    runtime = Runtime(folder)
    try:
        yield runtime
    finally:
        runtime.close()


async def test_a_container_outlives_the_log_process_and_loses_no_line(
    runtime: Runtime, tmp_path: Path
) -> None:
    logs = LogStore(tmp_path / "logs")
    try:
        stdout, _ = await logs.attach(ALLOC)
        await until((runtime.folder / "containerd.sock").exists)
        await asyncio.to_thread(
            runtime.run,
            "one",
            stdout,
            f"echo up; while ! [ -e /go ]; do :; done\n{SCRIPT}",
        )
        await until_logged(logs, ALLOC, "up")
        (pid,) = processes(tmp_path / "logs")
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not processes(tmp_path / "logs"))
        logs._let_go(ALLOC)  # the agent is gone as well: the shim alone holds the fifo
        (runtime.root / "go").touch()
        await until(lambda: runtime.waits_for_a_reader("one"))
        await logs.ensure_running()
        await until(lambda: runtime.state("one") == "STOPPED")
        deleted = await asyncio.to_thread(runtime.ctr, "tasks", "delete", "one")
        assert "exited with non-zero" not in deleted
        await logs.detach(ALLOC)
        lines = [line.line.split(" .")[0] async for line in logs.follow(ALLOC)]
        assert lines == ["up", *(f"line {number}" for number in range(40_000))]
    finally:
        await logs.stop()
