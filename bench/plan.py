"""How long a plan takes: 1,000 services on 100 nodes, 10,000 allocations on 1,000 nodes.

Run: python -m bench.plan [RUNS]. Prints medians, and beside them the plain way (sort all nodes
for each replica) in the same run.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

from reconciler.fsm.records import Allocation, Node, Revision, Service
from reconciler.fsm.state import State
from reconciler.language.spec import Health, Route, ServiceSpec, spec_hash
from reconciler.plan.diff import Wish, diff
from reconciler.plan.place import Demand, images, place, reserved
from reconciler.plan.plan import make_plan


def nodes(count: int) -> list[Node]:
    return [
        Node(name=f"node-{n:04}", number=n, api="", agent="",
             cpu_milli=64_000, memory_bytes=256 * 10**9)
        for n in range(count)
    ]


def specs(count: int, replicas: int) -> list[ServiceSpec]:
    return [
        ServiceSpec(
            name=f"s{n:04}", image=f"registry.example.com/s{n}:v1", port=8080, replicas=replicas,
            cpu_milli=100 + n % 7 * 50, memory_bytes=(100 + n % 5 * 50) * 10**6,
            health=Health(kind="tcp"), routes=(Route(host=f"s{n}.example.com"),),
        )
        for n in range(count)
    ]


def demands(of: list[ServiceSpec]) -> list[Demand]:
    return [
        Demand(s.name, s.cpu_milli, s.memory_bytes, s.replicas, f"sha256:{s.name}") for s in of
    ]


def sort_all(wanted: list[Demand], on: list[Node]) -> dict[str, list[str]]:
    """The plain way: for each replica, every node is looked at."""
    free = {n.name: (n.cpu_milli, n.memory_bytes) for n in on}
    total = dict(free)
    chosen: dict[str, list[str]] = {}
    for demand in wanted:
        used: dict[str, int] = {}
        for _ in range(demand.replicas):
            fitting = [
                (used.get(name, 0), -min(cpu / total[name][0], memory / total[name][1]), name)
                for name, (cpu, memory) in free.items()
                if cpu >= demand.cpu_milli and memory >= demand.memory_bytes
            ]
            name = min(fitting)[2]
            cpu, memory = free[name]
            free[name] = (cpu - demand.cpu_milli, memory - demand.memory_bytes)
            used[name] = used.get(name, 0) + 1
            chosen.setdefault(demand.service, []).append(name)
    return chosen


def live(of: list[ServiceSpec], on: list[Node]) -> State:
    """The state after all of it was deployed."""
    placed = place(demands(of), on, {}, {})
    services, stored, allocations = {}, {}, {}
    for spec in of:
        key = spec_hash(spec)
        stored[key] = spec
        revision = Revision(number=1, spec_hash=key, digest=f"sha256:{spec.name}")
        services[spec.name] = Service(name=spec.name, vip="", live=1, revisions=(revision,),
                                      last_revision=1)
        for number, slot in enumerate(placed.slots[spec.name]):
            alloc = Allocation(
                id=f"{spec.name}-{number:06}", service=spec.name, revision=1, slot=number,
                node=slot.node, address="", deploy="d-1", image=spec.image,
                digest=revision.digest, port=spec.port, cpu_milli=spec.cpu_milli,
                memory_bytes=spec.memory_bytes, status="healthy", live=True, started_ms=1,
            )
            allocations[alloc.id] = alloc
    return State(nodes={n.name: n for n in on}, services=services, specs=stored,
                 allocations=allocations)


def median_s(work: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def report(title: str, services: int, replicas: int, node_count: int, runs: int) -> None:
    on, of = nodes(node_count), specs(services, replicas)
    wanted = demands(of)
    count = services * replicas
    heap_s = median_s(lambda: place(wanted, on, {}, {}), runs)
    plain_s = median_s(lambda: sort_all(wanted[: max(1, services // 20)], on), 1) * 20
    state = live(of, on)
    wishes = [Wish(spec, f"sha256:{spec.name}") for spec in of]
    diff_s = median_s(lambda: diff(wishes, state), runs)
    again_s = median_s(lambda: place(wanted, on, reserved(state), images(state)), runs)
    moved = [Wish(spec, f"sha256:{spec.name}-2") for spec in of]
    whole_s = median_s(lambda: make_plan(moved, state), runs)
    print(f"{title}: {count} allocations")
    print(f"  place, empty cluster     {heap_s * 1000:8.1f} ms   "
          f"{heap_s / count * 100_000:6.2f} ms per 100")
    print(f"  place, full beside old   {again_s * 1000:8.1f} ms   "
          f"{again_s / count * 100_000:6.2f} ms per 100")
    print(f"  sort all (from a 20th)   {plain_s * 1000:8.1f} ms   {plain_s / heap_s:6.0f} times")
    print(f"  diff, nothing changed    {diff_s * 1000:8.1f} ms")
    print(f"  plan, every tag moved    {whole_s * 1000:8.1f} ms   "
          f"{whole_s / count * 100_000:6.2f} ms per 100")


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    report("1,000 services on 100 nodes", 1000, 2, 100, runs)
    report("1,000 services of 10 on 1,000 nodes", 1000, 10, 1000, runs)
    report("10,000 services of 1 on 1,000 nodes", 10_000, 1, 1000, runs)


if __name__ == "__main__":
    main()
