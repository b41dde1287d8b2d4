"""A cluster's history in fast motion: real log, real state machine, a deploy every five minutes.

`python -m tests.growth.history --deploys 100000` measures, as it grows, what a node keeps: the
state, the snapshot, the process's memory, and how long a start takes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from reconciler.clock import RealClock
from reconciler.executor.ledger import Ledger, StateMachine
from reconciler.fsm import commands as c
from reconciler.fsm.codec import encode_state
from reconciler.fsm.records import Change, Origin, Slot
from reconciler.language.spec import Health, ServiceSpec, canonical, spec_hash
from reconciler.log.replica import Member, Replica, Settings
from tests.log.certificates import Authority
from tests.log.cluster import free_members

APART_MS = 5 * 60 * 1000
"""Between two deploys: 288 a day, which is what is kept."""
KEEP_MS = 24 * 3600 * 1000


class FastClock(RealClock):
    """A wall clock that is moved on by hand."""

    def __init__(self) -> None:
        self.at_ms = 1_700_000_000_000

    def wall_ms(self) -> int:
        return self.at_ms


@dataclass
class History:
    """One node that leads alone, and the deploys of one service."""

    ledger: Ledger
    clock: FastClock
    deploys: int = 0

    async def leads(self) -> None:
        """Wait until this node leads."""
        while not self.ledger.is_leader:
            await asyncio.sleep(0.01)

    async def begin(self) -> None:
        """Found the cluster."""
        await self.leads()
        await self.ledger.propose(c.InitCluster("growing", "root", "0" * 64))
        await self.ledger.propose(c.RegisterNode(
            name="node-1", number=1, api="127.0.0.1:1", agent="127.0.0.1:2", log="127.0.0.1:3",
            cpu_milli=4_000, memory_bytes=8_000_000_000))

    async def deploy(self) -> None:
        """One update from its start to its end, as the leader's loops would write it."""
        self.clock.at_ms += APART_MS
        self.deploys += 1
        propose = self.ledger.propose
        spec = ServiceSpec(name="web", image=f"registry/web:v{self.deploys}", port=80,
                           health=Health(kind="tcp"))
        key = spec_hash(spec)
        await propose(c.StoreSpec(key, 0, 1, canonical(spec)))
        record = self.ledger.state.services.get("web")
        live = record.live if record else 0
        await propose(c.StartDeploy(
            changes=(Change(
                service="web", action="update" if live else "create", spec_hash=key,
                digest=f"sha256:{key}", from_revision=live,
                to_revision=(record.last_revision if record else 0) + 1,
                slots=(Slot("node-1"),)),),
            origin=Origin(), budget_ms=60_000))
        deploy = self.ledger.state.active_deploy
        alloc = f"web-{self.deploys % 36**6:06d}"
        await propose(c.ScheduleAlloc(alloc=alloc, service="web", node="node-1", slot=0,
                                      deploy=deploy))
        for was, status in (("pending", "starting"), ("starting", "running"),
                            ("running", "healthy")):
            await propose(c.SetAllocStatus(alloc=alloc, status=status, was=was))  # type: ignore[arg-type]  # names of states
        await propose(c.PassService(deploy, "web", 100))
        await propose(c.CommitDeploy(deploy))
        await propose(c.RouteDeploy(deploy))
        for old in [a for a in self.ledger.state.allocations.values() if a.status == "stopping"]:
            await propose(c.SetAllocStatus(alloc=old.id, status="stopped", was="stopping"))
        await propose(c.FinishDeploy(deploy))
        if self.deploys % 12 == 0:  # an hour has passed
            await propose(c.Trim(self.clock.at_ms - KEEP_MS))

    def state_bytes(self) -> int:
        """What a snapshot of this state holds."""
        return len(encode_state(self.ledger.state))


def settings(folder: Path, member: Member) -> Settings:
    """One voter, alone, in `folder`."""
    authority = Authority(folder)
    cert, key = authority.issue(member.name)
    return Settings(folder / "log", member, (member,), authority.file, cert, key)


@asynccontextmanager
async def growing(folder: Path) -> AsyncIterator[History]:
    """A history that has not begun, over a real journal in `folder`."""
    machine, clock = StateMachine(), FastClock()
    (member,) = free_members(1)
    replica = Replica(settings(folder, member), machine)
    ledger = Ledger(replica, machine, clock)
    await replica.start()
    replica.on_applied(ledger.woken)
    try:
        yield History(ledger, clock)
    finally:
        await replica.stop()


def rss_bytes() -> int:
    """This process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def opened_s(folder: Path) -> tuple[float, int]:
    """How long a start over this folder takes until it serves, and its memory then."""
    machine = StateMachine()
    (member,) = free_members(1)
    begun = time.monotonic()
    replica = Replica(settings(folder, member), machine)
    ledger = Ledger(replica, machine, RealClock())
    await replica.start()
    replica.on_applied(ledger.woken)
    while not replica.is_leader:
        await asyncio.sleep(0.001)
    took = time.monotonic() - begun
    await replica.stop()
    return took, rss_bytes()


def _opened_in_its_own_process(folder: Path) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.growth.history", "--open", str(folder)],
        capture_output=True, text=True, check=True)
    took, rss = done.stdout.split()
    return float(took), int(rss) / 1e6


async def _measure(deploys: int, folder: Path) -> None:
    marks = sorted({min(deploys, n) for n in (300, 2_000, 10_000, 30_000, 100_000, deploys)})
    print(f"{'deploys':>8} {'index':>9} {'state KB':>9} {'snapshot KB':>12} {'start s':>8} "
          f"{'start MB':>9} {'disk MB':>8}")
    begun, done = False, 0
    for mark in marks:
        async with growing(folder) as history:
            if not begun:
                await history.begin()
                begun = True
            else:
                await history.leads()
                last = history.ledger.state
                history.deploys, history.clock.at_ms = done, last.time_ms
            while history.deploys < mark:
                await history.deploy()
            done, index, size = history.deploys, history.ledger.state.index, history.state_bytes()
        snapshot = folder / "log" / "snapshot"
        took, rss = await asyncio.to_thread(_opened_in_its_own_process, folder)
        disk = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        print(f"{done:>8} {index:>9} {size / 1e3:>9.0f} "
              f"{(snapshot.stat().st_size if snapshot.exists() else 0) / 1e3:>12.0f} "
              f"{took:>8.2f} {rss:>9.0f} {disk / 1e6:>8.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deploys", type=int, default=100_000)
    parser.add_argument("--open", type=Path, help="only start over this folder, and say how long")
    asked = parser.parse_args()
    if asked.open:
        took, rss = asyncio.run(opened_s(asked.open))
        print(took, rss)
        return
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_measure(asked.deploys, Path(folder)))


if __name__ == "__main__":
    main()
