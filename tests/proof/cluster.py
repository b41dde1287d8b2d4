"""Nodes of mill on the machines of a lab, as real processes, to be hurt."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from reconciler.api.tls import client_context
from reconciler.edge.certificates import create_ca, issue, write_identity, write_private
from tests.machines.lab import Lab, Machine
from tests.proof.door import Address, Answer, Door, NoAnswer, NotSent
from tests.proof.member import API, Config, Deed

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 90.0  # for what takes two seconds: the machine may be busy with everything else
LOOK_S = 0.05

T = TypeVar("T")


class Cluster(Protocol):
    """What a round needs of a cluster; names are node-1 to node-N, on machines 1 to N."""

    @property
    def lab(self) -> Lab:
        """The machines."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """All nodes."""
        ...

    def address(self, name: str) -> Address:
        """Where and how its API is asked, from its own machine."""
        ...

    def start(self, name: str) -> None:
        """Have its process run (again)."""
        ...

    def kill(self, name: str) -> None:
        """SIGKILL."""
        ...

    def pause(self, name: str) -> None:
        """SIGSTOP."""
        ...

    def wake(self, name: str) -> None:
        """SIGCONT."""
        ...

    def deeds(self) -> list[Deed]:
        """What all nodes did so far, in time; empty where nobody writes it down."""
        ...

    def died(self) -> list[str]:
        """Processes that ended without being told to."""
        ...


@dataclass(frozen=True)
class View:
    """What one node says of the cluster, and of itself."""

    node: str
    leader: str | None
    term: int
    index: int


@dataclass
class Members:
    """A `Cluster` of `tests.proof.member` processes in `folder`; `environment` is added to
    theirs. A context manager over a lab that is there already."""

    lab: Lab
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _token: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    _tls: ssl.SSLContext | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """node-1 to node-N."""
        return tuple(f"node-{machine.number}" for machine in self.lab.machines)

    def found(self) -> None:
        """Certificates, keys and configurations; then every process."""
        authority, key = create_ca(), secrets.token_bytes(32)
        self._tls = client_context(authority.cert_pem)
        hosts = tuple((name, self._machine(name).address) for name in self.names)
        for name, host in hosts:
            folder = self.folder / name
            folder.mkdir(parents=True)
            write_identity(folder / "identity", issue(authority, name, (host,)))
            write_private(folder / "cluster.key", key)
            config = Config(name, str(folder), hosts, self._token, str(self.stop_file(name)))
            write_private(folder / "member.json", msgspec.json.encode(config))
        for name in self.names:
            self.start(name)

    def address(self, name: str) -> Address:
        """As `Cluster`."""
        machine = self._machine(name)
        return Address(machine.netns, machine.address, API, self._token, self._tls)

    def start(self, name: str) -> None:
        """As `Cluster`."""
        former = self._processes.get(name)
        if former is not None and former.poll() is None:
            return
        if self.died():
            raise AssertionError(f"{self.died()}: {self.logs()}")
        variables = {"PYTHONPATH": str(ROOT), "GRPC_ENABLE_FORK_SUPPORT": "0", **self.environment}
        argv = ["env", *(f"{key}={value}" for key, value in sorted(variables.items())),
                sys.executable, "-m", "tests.proof.member",
                str(self.folder / name / "member.json")]
        self._processes[name] = self.lab.spawn(
            self._number(name), argv, self.folder / name / "process.log")

    def kill(self, name: str) -> None:
        """As `Cluster`; returns once it is dead."""
        self._processes[name].kill()
        self._processes[name].wait(DEADLINE_S)

    def pause(self, name: str) -> None:
        """As `Cluster`; returns once it stands still."""
        os.kill(self._processes[name].pid, signal.SIGSTOP)
        deadline = time.monotonic() + DEADLINE_S
        while not self.is_paused(name):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} does not stop on SIGSTOP")

    def wake(self, name: str) -> None:
        """As `Cluster`."""
        if self._processes[name].poll() is None:
            os.kill(self._processes[name].pid, signal.SIGCONT)

    def is_paused(self, name: str) -> bool:
        """Whether its process stands still (proc(5): state T)."""
        stat = Path(f"/proc/{self._processes[name].pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"

    def stop_file(self, name: str) -> Path:
        """Where the moment is written at which it stops itself: `member.Stops`."""
        return self.folder / name / "stop-at"

    def died(self) -> list[str]:
        """As `Cluster`."""
        ended = {name: each.poll() for name, each in self._processes.items()}
        return [f"{name} ended with {code}" for name, code in sorted(ended.items())
                if code not in (None, -signal.SIGKILL)]

    def deeds(self) -> list[Deed]:
        """As `Cluster`."""
        decoder = msgspec.json.Decoder(Deed)
        found: list[Deed] = []
        for name in self.names:
            with contextlib.suppress(FileNotFoundError):
                data = (self.folder / name / "deeds.jsonl").read_bytes()
                found += decoder.decode_lines(data[:data.rfind(b"\n") + 1])
        return sorted(found, key=lambda deed: deed.at)

    def logs(self, last: int = 30) -> str:
        """The end of what each process wrote, for a failure's report."""
        pieces = []
        for name in self.names:
            text = (self.folder / name / "process.log").read_text(errors="replace")
            pieces += [f"--- {name}", *text.splitlines()[-last:]]
        return "\n".join(pieces)

    def _number(self, name: str) -> int:
        return int(name.removeprefix("node-"))

    def _machine(self, name: str) -> Machine:
        return self.lab.machine(self._number(name))


async def view(cluster: Cluster, name: str, timeout_s: float = 2.0) -> View | None:
    """What a node says without asking anybody; None where it does not answer."""
    answer = await ask(cluster, name, "GET", "/v1/status?stale=ok", timeout_s=timeout_s)
    if answer is None or answer.status != 200:
        return None
    body = answer.body
    leader, term, index = body.get("leader"), body.get("term"), body.get("index")
    assert isinstance(term, int), body
    assert isinstance(index, int), body
    return View(name, None if leader is None else str(leader), term, index)


async def ask(
    cluster: Cluster, name: str, method: str, path: str, body: object = None,
    timeout_s: float = 5.0,
) -> Answer | None:
    """One request over a connection of its own; None where no answer came."""
    door = Door(cluster.address(name))
    try:
        return await door.call(method, path, body, timeout_s)
    except (NotSent, NoAnswer):
        return None
    finally:
        door.close()


async def until(
    look: Callable[[], Awaitable[T | None]], what: str, deadline_s: float = DEADLINE_S
) -> T:
    """Look until there is something; TimeoutError says what there was not."""
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                found = await look()
                if found is not None:
                    return found
                await asyncio.sleep(LOOK_S)
    except TimeoutError as error:
        raise TimeoutError(f"not within {deadline_s:g} s: {what}") from error


async def leader_among(
    cluster: Cluster, names: Collection[str], above: int = -1, deadline_s: float = DEADLINE_S
) -> View:
    """The leader on whom all of `names` agree, itself one of them, of a term after `above`."""

    async def look() -> View | None:
        views = await asyncio.gather(*(view(cluster, name) for name in sorted(names)))
        seen = {(each.leader, each.term) for each in views if each is not None}
        if len(seen) != 1 or None in views:
            return None
        leader, term = seen.pop()
        mine = next((each for each in views if each and each.node == leader), None)
        return mine if term > above else None

    return await until(look, f"a leader of {sorted(names)} after term {above}", deadline_s)


async def quiet(cluster: Cluster) -> View:
    """All nodes follow one leader that answers reads and writes."""

    async def look() -> View | None:
        leader = await leader_among(cluster, cluster.names)
        answer = await ask(cluster, leader.node, "GET", "/v1/secrets")
        return leader if answer is not None and answer.status == 200 else None

    return await until(look, "a quiet cluster")
