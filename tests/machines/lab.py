"""N machines of a test: network namespaces joined by a bridge, with cables that can be cut.

    mlab-1f2e3d4c-m1 eth0 10.200.X.1/24 ──veth m1┐
    mlab-1f2e3d4c-m2 eth0 10.200.X.2/24 ──veth m2┤ br0 10.200.X.254 in mlab-1f2e3d4c-hub,
    mlab-1f2e3d4c-m3 eth0 10.200.X.3/24 ──veth m3┘ which also answers for 198.51.100.1, "outside"

A machine has the host's files and processes and a network of its own, loopback included. Its
default route is the hub, which routes nothing back but 10.200.X.0/24: whatever reaches the outside
from another address must have been masqueraded. The host's own network is not touched.

    with Lab(3) as lab:
        lab.run(1, ["ping", "-c", "1", lab.machine(2).address])
        lab.partition({1, 2}, {3})

Faults are nftables rules in the hub's bridge, by cable: they take every kind of frame, from now on
and for what flows already. They add up until `heal`. Delays are made by a relay
(`tests/machines/wire.py`), because not every kernel has netem.

What a killed run leaves behind is removed by the next `Lab` that starts: each names its process in
`/run/mlab/`, with its start time, so that a live one is never touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from reconciler.executor.containerd import network_namespace as namespace
from tests.machines.wire import Wire

__all__ = ["OUTSIDE", "Lab", "Machine", "sweep"]

OUTSIDE = "198.51.100.1"  # of TEST-NET-2, RFC 5737
OWNERS = Path("/run/mlab")
END_DEADLINE_S = 20.0
COMMAND_DEADLINE_S = 60.0


@dataclass(frozen=True)
class Machine:
    """One machine; number 0 is the hub, which stands for the outside."""

    number: int
    name: str
    address: str

    @property
    def netns(self) -> str:
        """The path of its network namespace."""
        return str(namespace.named(self.name))

    def command(self, argv: Sequence[str]) -> list[str]:
        """`argv` as it is started on this machine: same files, mounts and cgroups, other network.

        Not `ip netns exec`, which hides /sys/fs/cgroup behind a fresh sysfs.
        """
        return ["nsenter", f"--net={self.netns}", "--", *argv]


class Lab:
    """`count` machines, numbered from 1; a context manager, `with` or `async with`.

    At its end every process in the machines' namespaces is killed, then the namespaces go.
    """

    def __init__(self, count: int) -> None:
        if not 1 <= count <= 250:
            raise ValueError(f"{count} machines: 1 to 250, the number becomes part of an address")
        self.id = secrets.token_hex(4)
        self.subnet = f"10.200.{int(self.id, 16) % 250 + 1}"
        self._hub = Machine(0, f"mlab-{self.id}-hub", OUTSIDE)
        self.machines = tuple(
            Machine(number, f"mlab-{self.id}-m{number}", f"{self.subnet}.{number}")
            for number in range(1, count + 1)
        )
        self._spawned: list[subprocess.Popen[bytes]] = []
        self._wires: dict[int, Wire] = {}

    def machine(self, number: int) -> Machine:
        """The machine of that number; 0 is the hub."""
        if not 0 <= number <= len(self.machines):
            raise ValueError(f"machine {number}: this lab has 1 to {len(self.machines)}")
        return self.machines[number - 1] if number else self._hub

    def run(
        self, number: int, argv: Sequence[str], timeout_s: float = COMMAND_DEADLINE_S
    ) -> subprocess.CompletedProcess[str]:
        """Run `argv` there to its end; look at `returncode`, `stdout` and `stderr`."""
        return subprocess.run(
            self.machine(number).command(argv),
            capture_output=True, text=True, timeout=timeout_s, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def spawn(self, number: int, argv: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start `argv` there, with both outputs appended to `log`; it ends with the lab.

        The process is `argv`'s own (nsenter replaces itself), at the head of its own group. On
        return it is in the machine's network, or ended.
        """
        with log.open("ab") as out:
            process = subprocess.Popen(
                self.machine(number).command(argv), stdin=subprocess.DEVNULL, stdout=out,
                stderr=out, start_new_session=True,
            )  # fmt: skip
        self._spawned.append(process)
        inode = Path(self.machine(number).netns).stat().st_ino
        while process.poll() is None and inode != _network_of(process.pid):
            time.sleep(0.001)  # until nsenter is inside, the end of a killed run would miss it
        return process

    # ---- faults ---------------------------------------------------------------------------

    def partition(self, *groups: Collection[int]) -> None:
        """Cut machines of different groups off from each other; those in no group keep all."""
        for group in groups:
            others = [number for other in groups if other is not group for number in other]
            self._cut(f"iifname {_cables(group)} oifname {_cables(others)} drop" if others else "")

    def isolate(self, number: int) -> None:
        """Pull the cable of a machine: no other one and no outside, both ways."""
        cable = _cables([number])
        self._cut(f"iifname {cable} drop", f"oifname {cable} drop")

    def one_way(self, from_: int, to: int) -> None:
        """Drop what `from_` sends to `to`; the way back stays open (ARP entries are kept alive)."""
        # ARP needs both ways: without it the open way would die with the neighbour's entry.
        self._cut(f"iifname {_cables([from_])} oifname {_cables([to])} ether type != arp drop")

    def delay(self, number: int, ms: int) -> None:
        """Everything that a machine sends or receives takes `ms` longer; 0 ends that."""
        self.machine(number)
        wire = self._wires.pop(number, None)
        if wire:
            wire.close()
            _ip(self._hub.name, f"link set m{number} master br0")
        if ms:
            self._wires[number] = Wire(self._hub.name, f"m{number}", f"w{number}", "br0", ms / 1000)

    def heal(self) -> None:
        """End every fault."""
        self._nft("flush chain bridge faults cut; flush chain bridge faults own_in")
        self._nft("flush chain bridge faults own_out")
        for number in tuple(self._wires):
            self.delay(number, 0)
        for machine in (self._hub, *self.machines):
            # A neighbour sought in vain is given up a second later, with what waits for it.
            _ip(machine.name, "neigh flush all nud all")

    def _cut(self, *rules: str) -> None:
        chains = ("cut", "own_in", "own_out")  # what the bridge forwards; to and from the hub
        self._nft("\n".join(
            f"add rule bridge faults {chain} {rule}" for rule in rules if rule for chain in chains
        ))  # fmt: skip

    def _nft(self, text: str) -> None:
        subprocess.run(
            self._hub.command(["nft", "-f", "-"]), input=text, text=True, check=True,
            capture_output=True, timeout=COMMAND_DEADLINE_S,
        )  # fmt: skip

    # ---- begin and end --------------------------------------------------------------------

    def __enter__(self) -> Lab:
        sweep()
        _own(self.id)
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Lab:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.shield(asyncio.to_thread(self.close))

    def close(self) -> None:
        """Kill what runs in the machines and remove them; again is fine."""
        for number in tuple(self._wires):
            self._wires.pop(number).close()
        for process in self._spawned:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._spawned:
            process.wait(END_DEADLINE_S)
        self._spawned.clear()
        _remove(self.id)

    def _build(self) -> None:
        for machine in (self._hub, *self.machines):
            namespace.create(machine.name)
        # On by default here: a bridge would hand its frames to iptables' forward chain.
        namespace.write_setting(self._hub.name, "net/bridge/bridge-nf-call-iptables", 0)
        namespace.write_setting(self._hub.name, "net/bridge/bridge-nf-call-ip6tables", 0)
        _ip(
            self._hub.name,
            "link set lo up",
            f"addr add {OUTSIDE}/32 dev lo",
            "link add br0 type bridge",
            "link set br0 addrgenmode none up",
            f"addr add {self.subnet}.254/24 dev br0",
        )
        for machine in self.machines:
            cable = f"m{machine.number}"
            _ip(
                machine.name,
                "link set lo up",
                f"link add eth0 type veth peer name {cable} netns {self._hub.name}",
                f"addr add {machine.address}/24 dev eth0",
                "link set eth0 addrgenmode none up",
                f"route add default via {self.subnet}.254",
            )
            _ip(self._hub.name, f"link set {cable} addrgenmode none master br0 up")
        self._nft("".join(
            f"add table bridge faults\nadd chain bridge faults {chain} "
            f"{{ type filter hook {hook} priority 0; }}\n"
            for chain, hook in (("cut", "forward"), ("own_in", "input"), ("own_out", "output"))
        ))  # fmt: skip


def sweep() -> tuple[str, ...]:
    """Remove the labs of processes that are no more; their ids. One sweep at a time."""
    OWNERS.mkdir(exist_ok=True)
    with (OWNERS / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        gone = sorted(id_ for id_ in _labs() if not _owned(id_))
        for id_ in gone:
            _remove(id_)
        return tuple(gone)


def _labs() -> set[str]:
    names = {path.name for path in namespace.NETNS_FOLDER.glob("mlab-*-*")}
    ids = {found[1] for name in names if (found := re.match(r"mlab-([0-9a-f]{8})-", name))}
    return ids | {path.name for path in OWNERS.glob("[0-9a-f]*")}


def _own(id_: str) -> None:
    written = OWNERS / f".{id_}"  # renamed when whole: another run's sweep may look at any moment
    written.write_text(_identity(os.getpid()) or "")
    written.rename(OWNERS / id_)


def _owned(id_: str) -> bool:
    try:
        owner = (OWNERS / id_).read_text()
    except FileNotFoundError:
        return False
    return owner == _identity(int(owner.split()[0]))


def _identity(pid: int) -> str | None:
    """A process as `PID START`, start in clock ticks since boot (proc(5)): pids come again."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return f"{pid} {stat.rpartition(')')[2].split()[19]}"


def _remove(id_: str) -> None:
    names = sorted(path.name for path in namespace.NETNS_FOLDER.glob(f"mlab-{id_}-*"))
    paths = [namespace.named(name) for name in names]
    _kill_inside({path.stat().st_ino for path in paths if namespace.is_namespace(path)})
    for path in paths:
        if path.name.endswith("-hub") and namespace.is_namespace(path):
            _delete_links(path.name)  # at once, not when the kernel gets to the namespace
        namespace.remove(path)
    (OWNERS / id_).unlink(missing_ok=True)


def _delete_links(name: str) -> None:
    shown = subprocess.run(
        ["ip", "-n", name, "-br", "link"], capture_output=True, text=True, check=True
    ).stdout
    links = [line.split("@")[0].split()[0] for line in shown.splitlines()]
    _ip(name, *(f"link del {link}" for link in links if link != "lo"), force=True)


def _kill_inside(inodes: set[int]) -> None:
    """SIGKILL every process whose network is one of these, until there is none."""
    deadline = time.monotonic() + END_DEADLINE_S
    while pids := list(_processes_in(inodes)):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {pids} do not end on SIGKILL")
        time.sleep(0.01)


def _processes_in(inodes: set[int]) -> Iterator[int]:
    for process in Path("/proc").glob("[0-9]*"):
        if _network_of(int(process.name)) in inodes:
            yield int(process.name)


def _network_of(pid: int) -> int | None:
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    except OSError:  # it ended, or is a zombie
        return None


def _cables(numbers: Collection[int]) -> str:
    """Machines as an nftables set of their ports; `w` where a relay stands for `m`."""
    return "{ " + ", ".join(f'"m{n}", "w{n}"' for n in sorted(numbers)) + " }"


def _ip(name: str, *lines: str, force: bool = False) -> None:
    done = subprocess.run(
        ["ip", "-n", name, *(["-force"] if force else []), "-batch", "-"],
        input="".join(f"{line}\n" for line in lines), capture_output=True, text=True,
        timeout=COMMAND_DEADLINE_S, check=False,
    )  # fmt: skip
    if done.returncode and not force:
        raise RuntimeError(f"ip in {name}: {done.stderr.strip()}")
