"""Rounds: a cluster of real processes, clients, one kind of harm, and the whole history checked.

`python -m tests.proof.rounds --rounds 50 [--seed S]` runs rounds of consecutive seeds, one line
each, and goes on where an earlier run without --seed ended; sums are kept in `.soak/rounds.json`.
`python -m tests.proof.rounds --check FILE` checks a kept history again.

A seed rules the faults, the clients' choices and the size of the cluster; time stays real.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from tests.machines.lab import Lab
from tests.proof.clients import Crowd, Record, operate
from tests.proof.cluster import Cluster, Members, ask, quiet, until
from tests.proof.door import Door
from tests.proof.history import Operation, load, save
from tests.proof.linearizable import Undecided, Verdict, VersionedRegister, check, check_clock
from tests.proof.member import STUBBORN, Deed
from tests.proof.nemesis import FAULTS, Arena, Pause, mend

SOAK = Path(".soak")
KEYS = 4
ROUND_S = 400.0
ORDERED = frozenset({"start", "stop", "pull"})
MANIFEST = """\
service "web" {
  image    = "registry.example/web:1"
  replicas = 6
  cpu      = 0.01
  memory   = "8M"
}
"""


@dataclass(frozen=True)
class Plan:
    """What a seed stands for. `stubborn`: leaders do not let go for want of a majority, so that
    two believe to lead for as long as the fault lasts."""

    seed: int
    fault: str
    nodes: int
    stubborn: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The registers."""
        return tuple(f"s{self.seed}-k{n}" for n in range(KEYS))


def plan(seed: int) -> Plan:
    """Ten seeds in a row meet all faults; one in four has five nodes, one in two is stubborn."""
    rng = random.Random(f"plan {seed}")
    return Plan(seed, list(FAULTS)[seed % len(FAULTS)], 5 if rng.random() < 0.25 else 3,
                rng.random() < 0.5)


@dataclass
class Outcome:
    """How a round went; `broken` is what must not be."""

    plan: Plan
    record: Record
    broken: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    orders: int = 0
    woken_reads: int = 0
    elapsed_s: float = 0.0

    def __str__(self) -> str:
        count = self.record.outcomes
        verdict = "ok" if not self.broken else "FAILED: " + self.broken[0].splitlines()[0]
        return (f"seed {self.plan.seed}: {self.plan.nodes} nodes, {self.plan.fault}"
                f"{', stubborn' if self.plan.stubborn else ''}, "
                f"{count['read ok'] + count['write ok']} ops, {count['open']} open, "
                f"{self.orders} orders, {self.woken_reads} reads of a woken leader, "
                f"{self.elapsed_s:.1f} s: {verdict}")


async def run_round(what: Plan, cluster: Cluster) -> Outcome:
    """Harm the running cluster as planned, mend it, read everything once more, and judge."""
    record, began = Record(), time.monotonic()
    crowd = Crowd({name: cluster.address(name) for name in cluster.names}, what.keys, record,
                  what.seed)
    arena = Arena(cluster, crowd, record, random.Random(f"faults {what.seed}"))
    outcome = Outcome(what, record)
    await deploy(cluster)
    deploys = asyncio.create_task(_keep_deploying(cluster))
    clients = asyncio.create_task(crowd.run())
    try:
        async with asyncio.timeout(ROUND_S):
            await arena.writes()
            await FAULTS[what.fault](arena)
            await mend(arena)
            await arena.writes()
            await _stop(clients)
            await _read_all(arena)
    except TimeoutError as error:
        outcome.broken.append(f"it does not recover: {error}")
    finally:
        await _stop(clients, deploys)
    outcome.broken += [*arena.broken, *record.astray, *cluster.died()]
    outcome.broken += judge(record.operations)
    deeds = cluster.deeds()
    outcome.broken += judge_orders(deeds, arena.pauses)
    outcome.orders = sum(deed.what in ORDERED for deed in deeds)
    outcome.said, outcome.woken_reads = arena.said, arena.woken_reads
    outcome.elapsed_s = time.monotonic() - began
    return outcome


def judge(history: list[Operation]) -> list[str]:
    """What is wrong with a history."""
    try:
        verdict = check(history, VersionedRegister())
    except Undecided as error:
        return [f"undecided: {error}"]
    clock = check_clock(history)
    return [*([str(verdict)] if not verdict.ok else []),
            *([_backwards(clock)] if not clock.ok else [])]


def judge_orders(deeds: list[Deed], pauses: list[Pause]) -> list[str]:
    """Terms that an agent obeyed never go back, and nobody obeys a leader that slept through its
    own deposition."""
    newest: dict[str, int] = {}
    broken = []
    for deed in deeds:
        if deed.what not in ORDERED:
            continue
        if deed.term < newest.get(deed.node, 0):
            broken.append(f"{deed.node} obeyed term {newest[deed.node]}, then {deed}")
        newest[deed.node] = max(newest.get(deed.node, 0), deed.term)
        broken += [f"{deed.node} obeyed {pause.node}, woken at {pause.woken:.3f}: {deed}"
                   for pause in pauses if deed.at >= pause.woken and deed.term <= pause.term]
    return broken


async def deploy(cluster: Cluster, deadline_s: float = 60.0) -> str:
    """Have `MANIFEST` deployed; its id. The deploy goes on by itself."""
    body = {"files": {"web.mill": MANIFEST}}

    async def look() -> str | None:
        for name in cluster.names:
            answer = await ask(cluster, name, "POST", "/v1/deploy?detach=true", body, 30.0)
            if answer is not None and answer.status == 202:
                return str(answer.body["id"])
        return None

    return await until(look, "a deploy is taken", deadline_s)


async def _keep_deploying(cluster: Cluster) -> None:
    """So that leaders have something to order at any moment. What is refused is tried again."""
    while True:
        for name in cluster.names:
            await ask(cluster, name, "POST", "/v1/services/web/restart?detach=true", {}, 3.0)
            await asyncio.sleep(0.3)


async def _read_all(arena: Arena) -> None:
    """Each key through each node: what everybody now agrees on is the history's end."""
    for name in arena.cluster.names:
        door = Door(arena.cluster.address(name))
        for key in arena.crowd.keys:
            async def look(door: Door = door, key: str = key, name: str = name) -> bool | None:
                answer = await operate(door, "read", key, "", "last", name, arena.record)
                return True if answer is not None and answer.status in (200, 404) else None

            await until(look, f"{name} answers a read of {key}")
        door.close()


async def _stop(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _backwards(clock: Verdict) -> str:
    lines = "\n  ".join(f"index {each.index}: {each}" for each in clock.stuck)
    return f"the log's index runs back:\n  {lines}"


async def run_alone(what: Plan, environment: Mapping[str, str] | None = None) -> Outcome:
    """A round on a cluster of its own, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="mill-proof-") as folder:
        async with Lab(what.nodes) as lab:
            stubborn = {STUBBORN: "1"} if what.stubborn else {}
            cluster = Members(lab, Path(folder), {**stubborn, **(environment or {})})
            cluster.found()
            await quiet(cluster)
            outcome = await run_round(what, cluster)
            if outcome.broken:
                outcome.said.append(cluster.logs())
            return outcome


# ---- the soak ---------------------------------------------------------------------------------


class Sums(msgspec.Struct):
    """Over all runs. `next_seed` is where the next one without --seed begins."""

    next_seed: int = 1
    rounds: int = 0
    failed: list[int] = []
    operations: int = 0
    open: int = 0
    orders: int = 0
    faults: dict[str, int] = {}

    def add(self, outcome: Outcome) -> None:
        """One more round."""
        count = outcome.record.outcomes
        self.rounds += 1
        self.operations += count["read ok"] + count["write ok"]
        self.open += count["open"]
        self.orders += outcome.orders
        fault = outcome.plan.fault
        self.faults[fault] = self.faults.get(fault, 0) + 1
        if outcome.broken:
            self.failed.append(outcome.plan.seed)


def _read_sums(path: Path) -> Sums:
    with contextlib.suppress(FileNotFoundError):
        return msgspec.json.decode(path.read_bytes(), type=Sums)
    return Sums()


def _write_sums(path: Path, sums: Sums) -> None:
    path.parent.mkdir(exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_bytes(msgspec.json.format(msgspec.json.encode(sums)) + b"\n")
    fresh.replace(path)


def _keep(outcome: Outcome) -> None:
    path = SOAK / f"round-{outcome.plan.seed}.jsonl"
    save(path, outcome.record.operations)
    report = path.with_suffix(".txt")
    report.write_text("\n".join([*outcome.broken, *outcome.said]) + "\n")
    print(f"  kept: {path}, {report}; check it again: "
          f"python -m tests.proof.rounds --check {path}; run it again: "
          f"python -m tests.proof.rounds --rounds 1 --seed {outcome.plan.seed}", flush=True)


def main(argv: list[str]) -> int:
    """0 where every round was right."""
    parser = argparse.ArgumentParser(prog="tests.proof.rounds")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, help="begin here; not added to the sums")
    parser.add_argument("--check", type=Path, help="a kept history")
    asked = parser.parse_args(argv)
    if asked.check:
        broken = judge(load(asked.check))
        print("\n".join(broken) or "linearizable")
        return 1 if broken else 0
    path = SOAK / "rounds.json"
    sums = _read_sums(path)
    first, failed = asked.seed if asked.seed is not None else sums.next_seed, 0
    for seed in range(first, first + asked.rounds):
        outcome = asyncio.run(run_alone(plan(seed)))
        print(outcome, flush=True)
        if outcome.broken:
            failed += 1
            _keep(outcome)
        if asked.seed is None:
            sums.add(outcome)
            sums.next_seed = seed + 1
            _write_sums(path, sums)
    print(f"{asked.rounds} rounds, {failed} failed; in all runs: {sums.rounds} rounds, "
          f"{sums.operations} operations, {sums.open} open, {sums.orders} orders obeyed, "
          f"failed seeds {sums.failed}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
