"""Placement: examples, and what must hold whatever is asked."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.fsm.records import Allocation, Node, Slot
from reconciler.plan.place import (
    MAX_SHORTAGES,
    NODE_ADDRESSES,
    Demand,
    Reserved,
    Standing,
    kept,
    place,
    standing,
)


def node(name: str, cpu: int = 1000, memory: int = 1000, status: str = "ready") -> Node:
    return Node(name=name, number=1, api="", agent="", cpu_milli=cpu, memory_bytes=memory,
                status=status)  # type: ignore[arg-type]  # a status by name


def nodes_of(slots: tuple[Slot, ...]) -> list[str]:
    return [slot.node for slot in slots]


def test_the_first_deploy_of_the_readme_lands_where_it_says():
    on = [node(f"node-{n}", 4000, 8_000) for n in (1, 2, 3)]
    web = Demand("web", 500, 512, 2)
    api = Demand("api", 1000, 1000, 1)
    slots = place([web, api], on, {}, {}).slots
    assert nodes_of(slots["api"]) == ["node-1"]
    assert nodes_of(slots["web"]) == ["node-2", "node-3"]


def test_replicas_spread_before_the_freest_node_is_used_twice():
    on = [node("big", 10_000, 10_000), node("small", 200, 200)]
    slots = place([Demand("web", 100, 100, 3)], on, {}, {}).slots["web"]
    assert nodes_of(slots) == ["big", "small", "big"]


def test_the_scarcer_resource_decides():
    held = {"a": Reserved(100, 900, 1), "b": Reserved(600, 100, 1)}
    slots = place([Demand("web", 10, 10, 1)], [node("a"), node("b")], held, {}).slots["web"]
    assert nodes_of(slots) == ["b"]


def test_among_equals_the_node_with_the_image_is_taken_then_the_first_name():
    on = [node("a"), node("b"), node("c")]
    demand = Demand("web", 10, 10, 1, digest="sha256:x")
    assert nodes_of(place([demand], on, {}, {}).slots["web"]) == ["a"]
    present = {"sha256:x": frozenset({"c", "b"})}
    assert nodes_of(place([demand], on, {}, present).slots["web"]) == ["b"]


def test_an_image_does_not_beat_room():
    held = {"b": Reserved(500, 500, 1)}
    present = {"sha256:x": frozenset({"b"})}
    demand = Demand("web", 10, 10, 1, digest="sha256:x")
    assert nodes_of(place([demand], [node("a"), node("b")], held, present).slots["web"]) == ["a"]


@pytest.mark.parametrize("status", ["draining", "down"])
def test_only_ready_nodes_take_anything(status: str):
    placed = place([Demand("web", 10, 10, 1)], [node("a", status=status)], {}, {})
    assert placed.slots == {}
    assert placed.shortages[0].text == "1 of 1 replicas of web do not fit: no node is ready"


def test_a_shortage_names_what_is_short_and_the_nearest_node():
    held = {"a": Reserved(900, 0, 1), "b": Reserved(700, 0, 1)}
    placed = place([Demand("web", 400, 400, 2)], [node("a"), node("b")], held, {})
    assert placed.shortages[0].text == (
        "2 of 2 replicas of web do not fit: each needs 0.4 cores and 400 of memory; "
        "nearest is b, which has 0.3 cores free"
    )


def test_every_address_of_a_node_in_use_is_a_shortage_too():
    held = {"a": Reserved(0, 0, NODE_ADDRESSES)}
    placed = place([Demand("web", 1, 1, 1)], [node("a")], held, {})
    assert "none of its 253 addresses free" in placed.shortages[0].text


def test_what_does_not_fit_takes_no_room_from_what_does():
    placed = place([Demand("huge", 600, 1, 3), Demand("small", 500, 1, 2)],
                   [node("a"), node("b")], {}, {})
    assert [s.service for s in placed.shortages] == ["huge"]
    assert nodes_of(placed.slots["small"]) == ["a", "b"]


def test_shortages_are_bounded():
    many = [Demand(f"s{n}", 2000, 1, 1) for n in range(200)]
    assert len(place(many, [node("a")], {}, {}).shortages) == MAX_SHORTAGES


def test_kept_allocations_stand_at_their_own_slot_and_new_ones_fill_the_gaps():
    stays = (Standing("web-a", "a", 0), Standing("web-c", "c", 2))
    held = {"a": Reserved(10, 10, 1), "c": Reserved(10, 10, 1)}
    slots = place([Demand("web", 10, 10, 4, standing=stays)],
                  [node("a"), node("b"), node("c")], held, {}).slots["web"]
    assert slots == (Slot("a", "web-a"), Slot("b"), Slot("c", "web-c"), Slot("a"))


def test_what_stands_on_a_node_that_is_down_or_gone_cannot_be_kept():
    def alloc(where: str, **fields: object) -> Allocation:
        return Allocation(id=f"web-{where}", service="web", revision=1, slot=0, node=where,
                          address="", deploy="d-1", image="", digest="", port=None, cpu_milli=1,
                          memory_bytes=1, live=True, **fields)  # type: ignore[arg-type]  # a few

    on = {n.name: n for n in (node("up"), node("out", status="draining"),
                              node("off", status="down"))}
    there = [alloc("up", status="healthy"), alloc("out", status="healthy"),
             alloc("off", status="healthy"), alloc("away", status="healthy")]
    assert [(s.node, s.fit) for s in standing(there, on)] == [("up", True), ("out", False)]
    ending = [alloc("up", status=status) for status in ("stopping", "stopped", "failed", "lost")]
    assert standing(ending, on) == ()


def test_scaling_down_drops_the_unfit_then_the_crowd_then_the_highest_id():
    there = (
        Standing("web-1", "a", 0), Standing("web-2", "a", 1), Standing("web-3", "b", 2),
        Standing("web-4", "c", 3, fit=False), Standing("web-5", "c", 4),
    )
    def left(replicas: int) -> list[str]:
        return [s.alloc for s in kept(Demand("web", 1, 1, replicas, standing=there))]

    assert left(4) == ["web-1", "web-2", "web-3", "web-5"]
    assert left(3) == ["web-1", "web-3", "web-5"]
    assert left(2) == ["web-1", "web-3"]
    assert left(0) == []


# -- whatever is asked ---------------------------------------------------------------------

names = st.sampled_from([f"n{n}" for n in range(8)])
clusters = st.lists(
    st.builds(node, names, st.integers(0, 3000), st.integers(0, 3000),
              st.sampled_from(["ready", "ready", "ready", "draining", "down"])),
    max_size=8, unique_by=lambda n: n.name,
)
asked = st.lists(
    st.builds(
        Demand, st.sampled_from([f"s{n}" for n in range(10)]), st.integers(1, 1500),
        st.integers(1, 1500), st.integers(0, 6), st.sampled_from(["", "d1", "d2"]),
        st.lists(
            st.builds(Standing, st.sampled_from([f"x-{n}" for n in range(9)]), names,
                      st.integers(0, 6), st.booleans()),
            max_size=4, unique_by=lambda s: s.alloc,
        ).map(tuple),
    ),
    max_size=10, unique_by=lambda d: d.service,
)
holds = st.dictionaries(names, st.builds(Reserved, st.integers(0, 2000), st.integers(0, 2000),
                                         st.integers(0, NODE_ADDRESSES)))
presence = st.dictionaries(st.sampled_from(["d1", "d2"]), st.frozensets(names))


@given(asked, clusters, holds, presence)
@settings(max_examples=300, deadline=None)
def test_no_node_is_filled_over_its_capacity(demands, on, held, present):
    placed = place(demands, on, held, present)
    by_name = {d.service: d for d in demands}
    for there in on:
        new = [by_name[s] for s, slots in placed.slots.items() for slot in slots
               if slot.node == there.name and not slot.keep]
        if not new:
            continue
        before = held.get(there.name, Reserved())
        assert there.status == "ready"
        assert before.cpu_milli + sum(d.cpu_milli for d in new) <= there.cpu_milli
        assert before.memory_bytes + sum(d.memory_bytes for d in new) <= there.memory_bytes
        assert before.allocations + len(new) <= NODE_ADDRESSES


@given(asked, clusters, holds, presence, st.randoms())
@settings(max_examples=200, deadline=None)
def test_the_order_of_the_input_never_matters(demands, on, held, present, rng):
    first = place(demands, on, held, present)
    shuffled = list(demands)
    rng.shuffle(shuffled)
    turned = list(on)
    rng.shuffle(turned)
    assert place(shuffled, turned, dict(reversed(list(held.items()))), present) == first


@given(asked, clusters, holds, presence)
@settings(max_examples=200, deadline=None)
def test_every_service_is_placed_whole_or_named_as_short(demands, on, held, present):
    placed = place(demands, on, held, present)
    short = {s.service for s in placed.shortages}
    for demand in demands:
        if demand.service in short:
            assert demand.service not in placed.slots
            continue
        slots = placed.slots[demand.service]
        assert len(slots) == demand.replicas
        stays = {s.alloc: s.node for s in kept(demand)}
        assert {s.keep: s.node for s in slots if s.keep} == stays


@given(asked, clusters, holds, presence)
@settings(max_examples=200, deadline=None)
def test_one_service_alone_goes_where_looking_at_every_node_would_put_it(
    demands, on, held, present
):
    for demand in demands:
        placed = place([demand], on, held, present)
        assert placed.slots.get(demand.service) == _plainly(demand, on, held, present)


def _plainly(demand, on, held, present) -> tuple[Slot, ...] | None:
    """The rule as it is written, with a look at every node for every replica."""
    free = {n.name: [n.cpu_milli, n.memory_bytes, NODE_ADDRESSES] for n in on
            if n.status == "ready"}
    total = {n.name: (max(n.cpu_milli, 1), max(n.memory_bytes, 1)) for n in on}
    for name, taken in held.items():
        if name in free:
            free[name][0] -= taken.cpu_milli
            free[name][1] -= taken.memory_bytes
            free[name][2] -= taken.allocations
    stays = kept(demand)
    count = {name: sum(s.node == name for s in stays) for name in free}
    chosen = []
    while len(stays) + len(chosen) < demand.replicas:
        fitting = [
            (count[name],
             -min(cpu * 10**12 // total[name][0], memory * 10**12 // total[name][1]),
             name not in present.get(demand.digest, frozenset()), name)
            for name, (cpu, memory, addresses) in free.items()
            if cpu >= demand.cpu_milli and memory >= demand.memory_bytes and addresses > 0
        ]
        if not fitting:
            return None
        name = min(fitting)[3]
        free[name][0] -= demand.cpu_milli
        free[name][1] -= demand.memory_bytes
        free[name][2] -= 1
        count[name] += 1
        chosen.append(name)
    slots: list[Slot | None] = [None] * demand.replicas
    moved = []
    for stay in sorted(stays, key=lambda s: (s.slot, s.alloc)):
        if stay.slot < demand.replicas and slots[stay.slot] is None:
            slots[stay.slot] = Slot(stay.node, stay.alloc)
        else:
            moved.append(Slot(stay.node, stay.alloc))
    rest = iter([*moved, *(Slot(name) for name in chosen)])
    return tuple(slot if slot is not None else next(rest) for slot in slots)
