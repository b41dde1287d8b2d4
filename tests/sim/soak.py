"""Many seeds of all simulations, over many runs: `python -m tests.sim.soak --goal 10000`.

It goes on where the last run stopped; what was run is in `.soak/seeds.json`, each range of seeds
with the hash of the code that it ran, so that nobody counts seeds of other code by mistake. A
seed that fails is printed with the command that replays it, and the run goes on. Exit status 1
if any has failed with the present code.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tests.sim import run as of_the_log
from tests.sim.whole import run as of_the_whole

ROOT = Path(__file__).parents[2]
STATE = ROOT / ".soak" / "seeds.json"
CODE = ("reconciler", "tests/sim")
AT_ONCE = 10
"""Seeds of one simulation before the next has its turn."""


@dataclass(frozen=True)
class Kind:
    """One simulation. `replay` is its command line, to which the seed is added."""

    name: str
    run: Callable[[int], object]
    replay: str


def _of_the_log(flag: str = "") -> Kind:
    """The log's own worlds, with one kind of hardship or none."""
    kinds = {flag.replace("-", "_"): True} if flag else {}
    option = f" --{flag}" if flag else ""
    return Kind(f"log {flag}".strip(), lambda seed: of_the_log.run_seed(seed, **kinds),
                f"tests.sim.run{option} --seeds")


KINDS = (
    _of_the_log(),
    Kind("whole", of_the_whole.run, "tests.sim.whole.run --seeds"),
    *map(_of_the_log, ("bad-disks", "lost-disks", "membership", "stale-acks", "rivals",
                       "lost-names", "stale-reads")),
)


class Range(msgspec.Struct, omit_defaults=True):
    """Seeds [first, end) of one kind, run with one state of the code."""

    kind: str
    code: str
    first: int
    end: int
    failed: list[int] = []


class Soak:
    """All that was ever run here."""

    def __init__(self, path: Path, code: str) -> None:
        self._path, self.code = path, code
        self.ranges: list[Range] = []
        if path.exists():
            self.ranges = msgspec.json.decode(path.read_bytes(), type=list[Range])

    def next(self, kind: str) -> int:
        """The first seed that was never run."""
        return max((r.end for r in self.ranges if r.kind == kind), default=0)

    def add(self, kind: str, first: int, end: int, failed: list[int]) -> None:
        """Keep a range, on disk too."""
        last = next((r for r in reversed(self.ranges) if r.kind == kind), None)
        if last is not None and last.code == self.code and last.end == first:
            last.end = end
            last.failed.extend(failed)
        else:
            self.ranges.append(Range(kind, self.code, first, end, failed))
        self._path.parent.mkdir(exist_ok=True)
        beside = self._path.with_suffix(".new")
        beside.write_bytes(msgspec.json.format(msgspec.json.encode(self.ranges)))
        beside.replace(self._path)

    def count(self, *, present: bool = False, kind: str = "") -> int:
        """How many seeds were run; only those of the `present` code, or of one kind."""
        return sum(r.end - r.first for r in self._of(present, kind))

    def failures(self, *, present: bool = False) -> list[tuple[str, int]]:
        """Kind and seed of all that failed."""
        return [(r.kind, seed) for r in self._of(present, "") for seed in r.failed]

    def _of(self, present: bool, kind: str) -> list[Range]:
        return [r for r in self.ranges
                if (not present or r.code == self.code) and kind in ("", r.kind)]


def code_hash(root: Path) -> str:
    """Of every Python file that a simulation runs."""
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


Turn = tuple[int, int, int]
"""Seeds of one kind, by its place in KINDS: first and end."""


def run_turn(turn: Turn) -> list[int]:
    """The seeds that failed, each said at once."""
    number, first, end = turn
    logging.disable(logging.CRITICAL)
    kind, failed = KINDS[number], []
    for seed in range(first, end):
        try:
            kind.run(seed)
        except Exception as error:  # noqa: BLE001  # a failing seed is a result
            failed.append(seed)
            print(f"{kind.name} seed {seed} FAILED: {type(error).__name__}: {error}")
            print(f"  replay: python -m {kind.replay} {seed}", flush=True)
    return failed


def next_turns(soak: Soak, goal: int) -> list[Turn]:
    """The next seeds of each kind, no more of them all than the goal asks for."""
    turns, left = [], goal - soak.count()
    for number, kind in enumerate(KINDS):
        first = soak.next(kind.name)
        end = first + min(AT_ONCE, left)
        left -= end - first
        if end > first:
            turns.append((number, first, end))
    return turns


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--goal", type=int, default=10_000, help="seeds of all kinds and runs")
    parser.add_argument("--minutes", type=float, default=float("inf"),
                        help="no more turns after so long")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--state", type=Path, default=STATE)
    options = parser.parse_args(arguments)
    soak = Soak(options.state, code_hash(ROOT))
    ends_at = time.monotonic() + options.minutes * 60
    with ProcessPoolExecutor(options.jobs) as pool:
        while soak.count() < options.goal and time.monotonic() < ends_at:
            turns = next_turns(soak, options.goal)
            for (number, first, end), failed in zip(turns, pool.map(run_turn, turns), strict=True):
                soak.add(KINDS[number].name, first, end, failed)
            print(f"{soak.count()} of {options.goal} seeds", flush=True)
    _summary(soak)
    return 1 if soak.failures(present=True) else 0


def _summary(soak: Soak) -> None:
    for kind in KINDS:
        print(f"{kind.name}: {soak.count(kind=kind.name)} seeds, "
              f"{soak.count(present=True, kind=kind.name)} of them with the present code")
    states = len({r.code for r in soak.ranges})
    print(f"{soak.count()} seeds, {soak.count(present=True)} of them with the present code "
          f"({soak.code}); {states} states of the code in all; failed: "
          f"{len(soak.failures())}, with the present code {len(soak.failures(present=True))}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
