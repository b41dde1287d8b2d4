"""What `bench.log` measured, as the markdown of docs/benchmarks.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.log_loops import VALUE_BYTES, Figures

DOCS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
BEGIN = "<!-- python -m bench.log --docs: begin -->"
END = "<!-- python -m bench.log --docs: end -->"

ROWS = (
    ("api 1", "**mill: `PUT /v1/secrets/NAME` through the API**", 1),
    ("etcd 1", "**etcd: `Put` through gRPC**", 1),
    ("log 1", "mill: the log, inside the leader", 1),
    ("state 1", "mill: log and state machine, inside the leader", 1),
    ("api 32", "**mill: `PUT /v1/secrets/NAME` through the API**", 32),
    ("etcd 32", "**etcd: `Put` through gRPC**", 32),
    ("log 32", "mill: the log, inside the leader", 32),
    ("state 32", "mill: log and state machine, inside the leader", 32),
    ("nothing", "no log: mill's `GET /healthz`", 1),
    ("etcd nothing", "no log: etcd's serializable `Range` of no key", 1),
    ("read 1", "mill: linearizable read, inside the leader", 1),
    ("read 32", "mill: linearizable read, inside the leader", 32),
    ("one 1", "mill: the log on one node, inside it", 1),
    ("one 32", "mill: the log on one node, inside it", 32),
)
RATIOS: tuple[tuple[str, str, str, str, float], ...] = (
    ("api 1", "etcd 1", "p50_ms", "lone write through the API / etcd through gRPC, p50", 1.5),
    ("log 1", "etcd 1", "p50_ms", "lone write inside the leader / etcd through gRPC, p50", 1.0),
    ("api 32", "etcd 32", "per_s", "32 writers through the API / etcd, commits a second", 0.0),
    ("log 32", "etcd 32", "per_s", "32 writers inside the leader / etcd, commits a second", -1.0),
    ("api 1", "log 1", "p50_ms", "lone write through the API / inside the leader, p50", 0.0),
)
"""The last is the aim: at most so much, at least so much where it is negative, none where 0."""
FAILOVER_AIM_S = 2.0


@dataclass(frozen=True)
class Head:
    """Under what circumstances the run was. `loads` are the machine's, this bench included."""

    day: str
    took_s: float
    loads: Sequence[float]
    entries: int
    etcd: str


def markdown(
    head: Head,
    rounds: Sequence[Mapping[str, Figures]],
    failovers: tuple[list[float], list[float]],
    restarts: Mapping[str, Mapping[str, list[float]]],
) -> str:
    """All tables. Ratios are medians of the rounds' own ratios, with their range."""
    peer = f"etcd {head.etcd} with its defaults" if head.etcd else "etcd was not installed"
    loads = ", ".join(f"{load:.1f}" for load in head.loads)
    parts = [
        f"{head.day}, {len(rounds)} rounds, {head.took_s / 60:.1f} min in all; {peer}; three nodes "
        f"each, fsync on, values of {VALUE_BYTES} bytes. Load average at the start, after the "
        f"closed loops and at the end, this benchmark's own included: {loads}.",
        _commits(rounds),
    ]
    if head.etcd:
        parts.append(_ratios(rounds))
    parts += [_failovers(failovers), _restarts(head.entries, restarts)]
    if "followers" in rounds[0]:
        parts.append(_followers(rounds))
    return "\n\n".join(parts)


def put_into_docs(text: str) -> None:
    """Between the two marks of the page."""
    page = DOCS.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"{DOCS} lacks its marks: {BEGIN}"
    DOCS.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def _table(head: str, align: str, rows: Sequence[str]) -> str:
    return "\n".join([head, align, *rows])


def _commits(rounds: Sequence[Mapping[str, Figures]]) -> str:
    def median(name: str, of: Callable[[Figures], float]) -> float:
        return statistics.median(of(each[name]) for each in rounds)

    rows = [
        f"| {title} | {writers} | {median(name, lambda f: f['per_s']):,.0f} "
        f"| {median(name, lambda f: f['p50_ms']):.2f} | {median(name, lambda f: f['p99_ms']):.2f} |"
        for name, title, writers in ROWS
        if name in rounds[0]
    ]
    head = "| medians | at once | a second | p50 ms | p99 ms |"
    return _table(head, "|---|--:|--:|--:|--:|", rows)


def _ratios(rounds: Sequence[Mapping[str, Figures]]) -> str:
    rows = []
    for ours, theirs, figure, title, aim in RATIOS:
        found = sorted(_figure(each[ours], figure) / _figure(each[theirs], figure)
                       for each in rounds)
        ratio = statistics.median(found)
        if aim > 0:
            said = f"at most {aim:g}: {'met' if ratio <= aim else 'missed'}"
        elif aim < 0:
            said = f"at least {-aim:g}: {'met' if ratio >= -aim else 'missed'}"
        else:
            said = ""
        rows.append(f"| {title} | {ratio:.2f} ({found[0]:.2f}-{found[-1]:.2f}) | {said} |")
    return _table("| ratio | | aim |", "|---|--:|---|", rows)


def _figure(figures: Figures, name: str) -> float:
    return dict(figures)[name]  # type: ignore[return-value]  # all three are floats


def _failovers(failovers: tuple[list[float], list[float]]) -> str:
    ours, theirs = failovers
    met = "met" if max(ours) < FAILOVER_AIM_S else "missed"
    rows = [_failover("mill", ours, f"slowest under {FAILOVER_AIM_S:g} s: {met}")]
    if theirs:
        rows.append(_failover("etcd", theirs, ""))
    return _table(
        "| SIGKILL of the leader to the next acknowledged write, s "
        "| rounds | median | 9 of 10 within | slowest | aim |",
        "|---|--:|--:|--:|--:|---|", rows,
    )


def _failover(name: str, found: list[float], aim: str) -> str:
    ordered = sorted(found)
    most = ordered[min(len(ordered) - 1, int(len(ordered) * 0.9))]
    return (f"| {name} | {len(found)} | {statistics.median(found):.2f} | {most:.2f} "
            f"| {ordered[-1]:.2f} | {aim} |")


def _restarts(entries: int, restarts: Mapping[str, Mapping[str, list[float]]]) -> str:
    rows = [
        f"| {name} | {statistics.median(found['cluster']):.2f} | {max(found['cluster']):.2f} "
        f"| {statistics.median(found['follower']):.2f} | {max(found['follower']):.2f} "
        f"| {found['fill'][0]:.1f} |"
        for name, found in restarts.items()
    ]
    return _table(
        f"| {entries:,} entries, s | all killed: to the next acknowledged write | slowest "
        "| a follower killed: caught up | slowest | writing them |",
        "|---|--:|--:|--:|--:|--:|", rows,
    )


def _followers(rounds: Sequence[Mapping[str, Figures]]) -> str:
    p50, p99 = (
        statistics.median(_figure(each["followers"], name) for each in rounds)
        for name in ("p50_ms", "p99_ms")
    )
    return (f"A commit is known to a follower {p50:.2f} ms (p50; p99 {p99:.2f} ms) after its "
            "proposer knows it.")
