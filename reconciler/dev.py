"""`mill dev`: N nodes on one machine, with real log, containers and edge, and failures to try.

Each node is a process of its own; containerd, Envoy, DNS and log processes outlive it. All that
is made on the host carries the tag, a hash of the data folder, and only that is ever swept.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from reconciler.api.client import Client
from reconciler.dev_founding import HOST, Founding, Options, prepare, tag_of
from reconciler.errors import Conflict, MillError, NotFound, Unavailable
from reconciler.executor.containerd import network
from reconciler.executor.containerd.cgroups import remove_cgroup
from reconciler.executor.containerd.daemon import (
    purge_daemon,
    start_daemon,
    stop_daemon,
)
from reconciler.node_config import load
from reconciler.node_remains import (
    end_companions,
    end_containers,
    end_processes,
    processes_with,
)

ROOT = Path(__file__).resolve().parents[1]
__all__ = ["Answer", "Dev", "Founding", "Options", "check_machine", "command"]

STOP_S = 15.0
READY_S = 60.0
FREE_BYTES = 3 * 1024**3
PROGRAMS = {"containerd": "containerd", "runc": "runc", "ip": "iproute2", "nsenter": "util-linux"}

Say = Callable[[str], None]


class Missing(MillError):
    """This machine lacks something that `mill dev` needs."""


class Answer(msgspec.Struct, frozen=True):
    """What a running `mill dev` says to kill and start; no `what`: it is done."""

    what: str = ""
    hint: str = ""
    status: int = 0


def check_machine() -> None:
    """Refuse in one line what cannot work here."""
    if os.geteuid() != 0:
        raise Missing("mill dev needs root: it runs containers and makes network namespaces",
                      hint="run it with sudo")
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            raise Missing(f"{program} is not installed", hint=f"apt-get install {package}")


@dataclass
class Dev:
    """A cluster on this machine, in one data folder."""

    options: Options
    say: Say
    _children: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
    _expected: set[str] = field(default_factory=set)
    _watchers: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def data(self) -> Path:
        """The data folder, absolute."""
        return self.options.folder

    @property
    def tag(self) -> str:
        """What marks everything of this folder."""
        return self.options.tag

    @property
    def run_folder(self) -> Path:
        """Sockets and the kept namespace."""
        return self.options.run_folder

    @property
    def names(self) -> list[str]:
        """node-1 … node-N."""
        return self.options.names

    def address(self, name: str) -> str:
        """A node's API."""
        return f"http://{HOST}:{self.options.peer(int(name.removeprefix('node-'))).api_port}"

    # -- life ------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[Founding]:
        """The cluster, serving; at the end it stops with its containers, and its state stays."""
        with self._only_one():
            founding = prepare(self.options)
            await self._end_leftovers()
            await asyncio.to_thread(start_daemon, self.data / "containerd")
            await network.keep_host_namespace(self.run_folder / "host.netns")
            control = await self._listen()
            try:
                await asyncio.gather(*(self._spawn(name) for name in self.names))
                await self._ready(founding)
                yield founding
            finally:
                control.close()
                await self._down()

    @contextlib.contextmanager
    def _only_one(self) -> Iterator[None]:
        self.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self.data / "lock", "w", opener=_private) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Conflict(f"mill dev runs on {self.options.data} already",
                               hint="stop it with Ctrl-C, or choose another --data") from error
            yield

    # -- nodes -----------------------------------------------------------------------------

    async def _spawn(self, name: str) -> None:
        folder = self.data / name
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        log = folder / "node.log"
        with open(log, "ab", opener=_private) as output:  # noqa: ASYNC230  a local file, at once
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "reconciler.node", str(folder / "node.json"), name,
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": path, "GRPC_ENABLE_FORK_SUPPORT": "0"},
            )
        self._children[name] = child
        self._expected.add(name)
        watcher = asyncio.create_task(self._watch(name, child))
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)

    async def _watch(self, name: str, child: asyncio.subprocess.Process) -> None:
        """A node that dies is reported and stays dead, so that anyone can try a failure."""
        code = await child.wait()
        if self._children.get(name) is child:
            del self._children[name]
        if name in self._expected:
            self._expected.discard(name)
            how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
            self.say(f"{name} {how}; its log: {self.options.data / name / 'node.log'}; "
                     f"start it again with: mill dev start {name}")

    async def _stop(self, name: str, number: signal.Signals) -> None:
        """End a node's process, whoever started it: its command line may be run by hand."""
        self._expected.discard(name)
        config = str(self.data / name / "node.json")
        try:
            async with asyncio.timeout(STOP_S):
                await end_processes(config, number)
        except TimeoutError:
            await end_processes(config, signal.SIGKILL)
        child = self._children.get(name)
        if child is not None:
            await child.wait()

    async def kill(self, name: str) -> None:
        """A power cut: process, Envoy, DNS, containers and link of one node."""
        self._known(name)
        await self._stop(name, signal.SIGKILL)
        config = load(self.data / name / "node.json")
        await end_companions(config)
        await end_containers(config, self.data / "containerd")
        await network.link_down(config.layout)
        self.say(f"{name} is off")

    async def start(self, name: str) -> None:
        """Switch a node on again."""
        self._known(name)
        if name in self._children or processes_with(str(self.data / name / "node.json")):
            raise Conflict(f"{name} runs already", hint=f"end it with: mill dev kill {name}")
        await self._spawn(name)
        self.say(f"{name} is on")

    def _known(self, name: str) -> None:
        if name not in self.names:
            raise NotFound(f"there is no {name} here", hint=f"there are {', '.join(self.names)}")

    # -- ending ----------------------------------------------------------------------------

    async def _down(self) -> None:
        await asyncio.gather(*(self._stop(name, signal.SIGTERM) for name in self.names))
        configs = [load(self.data / name / "node.json") for name in self.names]
        await asyncio.gather(*(end_companions(config) for config in configs))
        daemon = self.data / "containerd"
        await asyncio.gather(*(end_containers(config, daemon) for config in configs))
        await asyncio.to_thread(stop_daemon, daemon)
        remove_cgroup(f"/mill-{self.tag}")
        await network.sweep(self.tag)
        shutil.rmtree(self.run_folder, ignore_errors=True)

    async def _end_leftovers(self) -> None:
        """Node processes that outlived a `mill dev` that was killed. Their containers, Envoy and
        DNS stay: the new processes take them up."""
        for name in self.names:
            await end_processes(str(self.data / name / "node.json"), signal.SIGKILL)

    async def reset(self) -> None:
        """Forget the cluster: processes, containers, networks, state."""
        if not (self.data / "dev.json").exists() and self.data.exists() and any(
                p.name not in ("lock", "containerd") for p in self.data.iterdir()):
            raise MillError(f"{self.options.data} is not a folder of mill dev",
                            hint="name the right one with --data")
        with self._only_one():
            for number in range(1, 254):
                config = self.data / f"node-{number}" / "node.json"
                if config.exists():
                    await end_processes(str(config), signal.SIGKILL)
                    await end_companions(load(config))
            await asyncio.to_thread(purge_daemon, self.data / "containerd")
            remove_cgroup(f"/mill-{self.tag}")
            await network.sweep(self.tag)
            shutil.rmtree(self.run_folder, ignore_errors=True)
        shutil.rmtree(self.data, ignore_errors=True)

    # -- ready -----------------------------------------------------------------------------

    async def _ready(self, founding: Founding) -> None:
        """Until every node serves, or one has died, which says why."""
        try:
            async with asyncio.timeout(READY_S):
                for name in self.names:
                    while not await self._serves(name, founding):
                        if name not in self._children:
                            raise Unavailable(f"{name} did not start: {self._last_line(name)}",
                                              at=str(self.data / name / "node.log"))
                        await asyncio.sleep(0.1)
        except TimeoutError as error:
            raise Unavailable(f"the cluster does not serve after {READY_S:.0f} s",
                              hint=f"look at {self.options.data}/node-*/node.log") from error

    async def _serves(self, name: str, founding: Founding) -> bool:
        """It answers, and from where it stands every node is there with its edge."""
        async with Client([self.address(name)], founding.token) as client:
            try:
                status = await client.status()
            except MillError:
                return False
        seen = [node for node in status.nodes if node.last_seen is not None]
        return len(seen) == self.options.nodes and not status.warnings

    def _last_line(self, name: str) -> str:
        lines = (self.data / name / "node.log").read_text(errors="replace").splitlines()
        return lines[-1] if lines else "it said nothing"

    # -- control ---------------------------------------------------------------------------

    async def _listen(self) -> asyncio.Server:
        path = self.run_folder / "dev.sock"
        path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._command, path)
        path.chmod(0o600)
        return server

    async def _command(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        words = (await reader.readline()).decode().split()
        try:
            match words:
                case ["kill", name]:
                    await self.kill(name)
                case ["start", name]:
                    await self.start(name)
                case _:
                    raise MillError(f"unknown command {' '.join(words)}")
            answer = Answer()
        except MillError as error:
            answer = Answer(error.what, error.hint, error.status)
        writer.write(msgspec.json.encode(answer) + b"\n")
        await writer.drain()
        writer.close()


def command(data: Path, verb: str, name: str) -> None:
    """Have the running `mill dev` of a folder kill or start a node."""
    path = Path("/run") / f"mill-{tag_of(data)}" / "dev.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(str(path))
        except OSError as error:
            raise Unavailable(f"no mill dev runs on {data}", hint="start one with: mill dev") \
                from error
        sock.sendall(f"{verb} {name}\n".encode())
        answer = msgspec.json.decode(sock.makefile("rb").readline(), type=Answer)
    if answer.what:
        raise (NotFound if answer.status == 404 else Conflict)(answer.what, hint=answer.hint)


def _private(path: str, flags: int) -> int:
    """An opener of files for root alone."""
    return os.open(path, flags, 0o600)
