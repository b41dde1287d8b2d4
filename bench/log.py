"""The log beside etcd, in one run: commits, failover, restart. Three nodes each, fsync on.

`python -m bench.log [--runs 5] [--seconds 2] [--failovers 50] [--entries 100000] [--docs]`. It
prints markdown; `--docs` puts that into docs/benchmarks.md as well. etcd (Debian: etcd-server,
which `make bench` installs) is three processes on free loopback ports in a temporary folder; where
it is not on PATH, ours is measured alone. Figures of a shared machine differ by 2x from run to
run: compare within one run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench import log_faults, log_report
from bench.log_clusters import Etcd, Mill
from bench.log_loops import Figures

WARM_S = 0.3  # before anything is measured: code paths, buffers, the first blocks of the journal
SHORT_S = 1.0  # what is no headline
Round = dict[str, Figures]


async def log_alone(folder: Path, seconds: float) -> Round:
    """Inside the leader, without a state machine: three nodes, then one."""
    found: Round = {}
    for count in (3, 1):
        own = folder / str(count)
        own.mkdir()
        async with Mill(own, count, api=False) as cluster:
            leader = await cluster.leader()
            await cluster.inside(leader, "write", 32, WARM_S)
            for callers in (1, 32):
                kind = "log" if count == 3 else "one"
                spent = seconds if count == 3 else SHORT_S
                found[f"{kind} {callers}"] = await cluster.inside(leader, "write", callers, spent)
            if count == 3:
                for callers in (1, 32):
                    found[f"read {callers}"] = await cluster.inside(
                        leader, "read", callers, SHORT_S
                    )
                waits = await cluster.to_followers(leader)
                found["followers"] = {
                    "per_s": 0.0, "p50_ms": statistics.median(waits),
                    "p99_ms": waits[int(len(waits) * 0.99)],
                }  # fmt: skip
    return found


async def whole_way(folder: Path, seconds: float) -> Round:
    """The real state machine: inside the leader, and through the API from another process."""
    found: Round = {}
    async with Mill(folder, api=True) as cluster:
        leader = await cluster.leader()
        await cluster.loop(leader, 32, WARM_S)
        found["nothing"] = await cluster.nothing(leader, SHORT_S)
        for callers in (1, 32):
            found[f"state {callers}"] = await cluster.inside(leader, "write", callers, SHORT_S)
            found[f"api {callers}"] = await cluster.loop(leader, callers, seconds)
    return found


async def peer(folder: Path, seconds: float) -> Round:
    """etcd through gRPC, from the same process with the same loop."""
    found: Round = {}
    async with Etcd(folder) as cluster:
        leader = await cluster.leader()
        await cluster.loop(leader, 32, WARM_S)
        found["etcd nothing"] = await cluster.nothing(leader, SHORT_S)
        for callers in (1, 32):
            found[f"etcd {callers}"] = await cluster.loop(leader, callers, seconds)
    return found


async def one_round(number: int, seconds: float, etcd: bool) -> Round:
    """Everything once, on fresh folders; who begins changes from round to round."""
    contenders = [log_alone, whole_way, peer][: 2 + etcd]
    first = number % len(contenders)
    found: Round = {}
    for contender in contenders[first:] + contenders[:first]:
        with tempfile.TemporaryDirectory() as folder:
            found |= await contender(Path(folder), seconds)
    return found


async def run(options: argparse.Namespace) -> str:
    """The whole, as markdown. SIGTERM ends it as Control-C does: nothing stays behind."""
    here = asyncio.current_task()
    assert here is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, here.cancel)
    etcd = shutil.which("etcd") is not None
    began, load = time.time(), os.getloadavg()[0]
    rounds = []
    for number in range(options.runs):
        rounds.append(await one_round(number, options.seconds, etcd))
        print(f"round {number + 1} done", file=sys.stderr, flush=True)
    loads = [load, os.getloadavg()[0]]
    ours, theirs = await log_faults.failovers(
        options.failovers, options.etcd_failovers if etcd else 0
    )
    print("failovers done", file=sys.stderr, flush=True)
    restarted = await log_faults.all_restarts(options.entries, options.restarts, etcd)
    loads.append(os.getloadavg()[0])
    head = log_report.Head(time.strftime("%Y-%m-%d"), time.time() - began, loads,
                           options.entries, await version() if etcd else "")
    return log_report.markdown(head, rounds, (ours, theirs), restarted)


async def version() -> str:
    """etcd's own."""
    process = await asyncio.create_subprocess_exec("etcd", "--version", stdout=-1)
    said, _ = await process.communicate()
    return said.decode().partition("\n")[0].rpartition(" ")[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="rounds of the closed loops")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each closed loop")
    parser.add_argument("--failovers", type=int, default=50)
    parser.add_argument("--etcd-failovers", type=int, default=20)
    parser.add_argument("--entries", type=int, default=100_000, help="before a restart")
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--docs", action="store_true", help="put it into docs/benchmarks.md")
    options = parser.parse_args()
    text = asyncio.run(run(options))
    print(text)
    if options.docs:
        log_report.put_into_docs(text)


if __name__ == "__main__":
    main()
