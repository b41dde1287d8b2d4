"""A cluster of machines in a lab: `mill` as a person runs it on each, agents, and a registry each.

Everything goes through the command line, from within the machine's own network. The registry is one
folder of images, served on the same loopback port of every machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reconciler.machine import Place, agent_pid
from tests.images.build import publish_demo_images
from tests.images.registry import local_registry
from tests.machines.lab import Lab

ROOT = Path(__file__).resolve().parents[2]
WITHIN_S = 90.0


class Failed(AssertionError):
    """A command ended with another code than it should."""


@dataclass
class Machines:
    """The machines of a lab as nodes; number K is `node-K`, its data in `K/`."""

    lab: Lab
    folder: Path
    registry: str
    agents: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    made: set[int] = field(default_factory=set)
    by_hand: bool = False
    """Commands go through `ip netns exec`, which hides the cgroups, and share one home."""

    def data(self, number: int) -> Path:
        """The data folder of a node."""
        return self.folder / str(number)

    def place(self, number: int) -> Place:
        """Where a node's things are."""
        return Place(self.data(number))

    def argv(self, *words: str) -> list[str]:
        """A call of the program."""
        return [sys.executable, "-m", "reconciler.cli.main", *words]

    def env(self, number: int) -> list[str]:
        """What a command is started with on a machine: a home of its own."""
        home = self.folder / ("home" if self.by_hand else f"home-{number}")
        home.mkdir(exist_ok=True)
        into = ["ip", "netns", "exec", self.lab.machine(number).name] if self.by_hand else []
        return [*into, "env", f"HOME={home}", f"PYTHONPATH={ROOT}", "NO_COLOR=1"]

    def call(
        self, number: int, *words: str, typed: str = "", timeout_s: float = 150.0
    ) -> subprocess.CompletedProcess[str]:
        """`mill WORDS` on a machine, to its end."""
        argv = self.lab.machine(number).command([*self.env(number), *self.argv(*words)])
        return subprocess.run(
            argv, capture_output=True, text=True, timeout=timeout_s, check=False, input=typed
        )

    def mill(self, number: int, *words: str, typed: str = "", timeout_s: float = 150.0) -> str:
        """What `mill WORDS` printed; it must have ended with 0."""
        done = self.call(number, *words, typed=typed, timeout_s=timeout_s)
        if done.returncode:
            raise Failed(
                f"mill {' '.join(words)} on {number}: {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def json(self, number: int, *words: str) -> Any:
        """The JSON document that `mill WORDS --json` printed."""
        return json.loads(self.mill(number, *words, "--json"))

    # -- nodes -----------------------------------------------------------------------------

    def init(self, number: int = 1) -> None:
        """Found the cluster on a machine, and run it."""
        self.made.add(number)
        self.mill(
            number,
            "init",
            "--data",
            str(self.data(number)),
            "--name",
            f"node-{number}",
            "--advertise",
            self.lab.machine(number).address,
        )
        self.agent(number)
        self.until(lambda: self.call(number, "status", "--json").returncode == 0)

    def join(self, number: int, via: int = 1, token: str = "") -> None:
        """Let a machine join, and run it."""
        text = token or self.json(via, "token", "create", "--join")["token"]
        self.made.add(number)
        self.mill(
            number,
            "join",
            self.lab.machine(via).address,
            "--token",
            text,
            "--data",
            str(self.data(number)),
            "--name",
            f"node-{number}",
            "--advertise",
            self.lab.machine(number).address,
        )
        self.agent(number)

    def agent(self, number: int, *more: str) -> None:
        """Run the node's agent."""
        words = self.argv("agent", "--data", str(self.data(number)), *more)
        log = self.folder / f"agent-{number}.log"
        self.agents[number] = self.lab.spawn(number, [*self.env(number), *words], log)

    def kill(self, number: int) -> None:
        """SIGKILL the agent; what it started goes on."""
        self.signal(number, signal.SIGKILL)
        self.agents.pop(number).wait(30)

    def reboot(self, number: int) -> None:
        """The machine loses its processes, its namespaces and what is below /run; it stays off."""
        tag, data = self.place(number).tag, str(self.data(number))
        process = self.agents.pop(number)
        for pid in self.processes(number):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(30)
        for mount in sorted(_mounts_below(f"{data}/", f"/run/mill-{tag}/"), reverse=True):
            subprocess.run(["umount", "--lazy", mount], check=True)
        for path in Path("/run/netns").glob(f"mill-{tag}-*"):
            subprocess.run(["ip", "netns", "delete", path.name], check=True)
        shutil.rmtree(f"/run/mill-{tag}")
        self.lab.run(number, ["nft", "flush", "ruleset"])

    def processes(self, number: int) -> list[int]:
        """All that runs on the machine but its registry: the node's, and its containers."""
        tag = self.place(number).tag
        names = [self.lab.machine(number).netns,
                 *map(str, Path("/run/netns").glob(f"mill-{tag}-*"))]
        inodes = {Path(name).stat().st_ino for name in names}
        found = set(_processes_with(f"mill-{tag}"))
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (entry / "ns" / "net").stat().st_ino in inodes:
                    found.add(int(entry.name))
        return sorted(pid for pid in found if "docker-registry" not in command_of(pid))

    def signal(self, number: int, which: signal.Signals) -> None:
        """Signal the agent's process."""
        os.kill(self.pid(number), which)

    def pid(self, number: int) -> int:
        """The agent's process."""
        pid = agent_pid(self.place(number))
        assert pid is not None, f"no agent on {number}: {self.said(number)[-2000:]}"
        return pid

    def said(self, number: int) -> str:
        """What the agent logged."""
        log = self.folder / f"agent-{number}.log"
        return log.read_text(errors="replace") if log.exists() else ""

    # -- looking ---------------------------------------------------------------------------

    def nodes(self, asked: int = 1) -> dict[str, Any]:
        """The nodes' rows by name, as one machine is told."""
        return {row["name"]: row for row in self.json(asked, "nodes")["nodes"]}

    def leader(self, asked: int = 1) -> int:
        """The number of the node that leads; 0 for none."""
        leads = [name for name, row in self.nodes(asked).items() if row["leader"]]
        return int(leads[0].removeprefix("node-")) if leads else 0

    def ready(self, numbers: set[int], voters: int, asked: int = 1) -> bool:
        """All of them serve, and so many vote."""
        rows = self.nodes(asked)
        names = {f"node-{number}" for number in numbers}
        return (
            set(rows) == names
            and sum(row["voter"] for row in rows.values()) == voters
            and all(row["status"] == "ready" and row["last_seen"] for row in rows.values())
            and not self.json(asked, "status").get("warnings")
        )

    def allocations(self, asked: int = 1) -> dict[str, dict[str, Any]]:
        """Allocations of all services by id."""
        rows = self.json(asked, "services")["services"]
        return {a["id"]: {**a, "service": row["name"]} for row in rows for a in row["allocations"]}

    def deploy(self, number: int, text: str, *more: str) -> subprocess.CompletedProcess[str]:
        """Deploy a manifest; `REG` is the registry."""
        path = self.folder / "app.mill"
        path.write_text(text.replace("REG", self.registry))
        return self.call(number, "deploy", "-f", str(path), *more)

    def curl(self, number: int, url: str, *more: str) -> str:
        """Body and status, separated by a space, as asked from a machine."""
        return self.lab.run(
            number, ["curl", "-s", "-m", "10", "-w", " %{http_code}", *more, url]
        ).stdout

    def answering(self, number: int, requests: int = 30) -> set[str]:
        """The allocations that answer through a machine's ingress."""
        seen = set()
        url = f"http://{self.lab.machine(number).address}/"
        for _ in range(requests):
            body = self.curl(number, url, "-H", "Host: app.example.com")
            if body.endswith(" 200"):
                seen.add(next(w for w in body.split() if w.startswith("alloc=")))
        return seen

    def inside(self, number: int, alloc: str, argv: list[str]) -> str:
        """What `argv` prints in the network of an allocation that runs on a machine."""
        path = self.place(number).config().layout.container_path(alloc)
        done = subprocess.run(
            ["nsenter", f"--net={path}", "--", *argv],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return (done.stdout + done.stderr).strip()

    def until(self, holds: Callable[[], bool], within_s: float = WITHIN_S) -> None:
        """Wait for a fact; what a command that fails says is not one yet."""
        deadline = time.monotonic() + within_s
        last = ""
        while True:
            try:
                if holds():
                    return
            except (Failed, AssertionError) as error:
                last = str(error)
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {n}\n{self.said(n)[-1500:]}" for n in sorted(self.made))
                raise TimeoutError(f"not within {within_s:.0f} s; {last}\n{logs}")
            time.sleep(0.1)

    def forget(self) -> None:
        """End every agent and clean every machine."""
        for number in list(self.agents):
            with contextlib.suppress(ProcessLookupError, AssertionError):
                self.signal(number, signal.SIGKILL)
        for number in sorted(self.made):
            if self.place(number).config_path.exists():
                self.call(number, "leave", "--force", "--yes", "--data", str(self.data(number)))


@contextlib.contextmanager
def machines(count: int, folder: Path, images: Path) -> Iterator[Machines]:
    """So many machines with a registry, and no node yet. `images`: a folder of `published`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = images / "config.yml"
    registry = next(
        line.split('"')[1] for line in config.read_text().splitlines() if "addr:" in line
    )
    with Lab(count) as lab:
        for machine in lab.machines:
            lab.spawn(
                machine.number,
                ["docker-registry", "serve", str(config)],
                folder / f"registry-{machine.number}.log",
            )
        all_of_them = Machines(lab, folder, registry)
        try:
            yield all_of_them
        finally:
            all_of_them.forget()


def _processes_with(mark: str) -> list[int]:
    """Processes with that in their command line: what a node started, containers' too."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            groups = (entry / "cgroup").read_text()
            if mark in command_of(int(entry.name)) or f"/{mark}/" in groups:
                found.append(int(entry.name))
    return found


def command_of(pid: int) -> str:
    """A process's command line; "" for one that is gone."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).replace("\0", " ")
    except OSError:
        return ""


def _mounts_below(*folders: str) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [point for line in lines if (point := line.split()[4]).startswith(folders)]


def published(folder: Path) -> Path:
    """A registry's folder with the demo's images in it."""
    with local_registry(folder) as url:
        publish_demo_images(url)
    return folder
