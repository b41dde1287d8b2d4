"""The order of starts."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from reconciler.plan.order import cycle, longest_ms, waves

names = st.sampled_from([f"s{n}" for n in range(8)])
graphs = st.dictionaries(names, st.lists(names, max_size=4, unique=True).map(tuple))


def test_each_level_needs_only_what_stands_before_it():
    needs = {"web": ("api", "cache"), "api": ("db",), "cache": (), "db": ()}
    assert waves(needs) == (("cache", "db"), ("api",), ("web",))


def test_a_dependency_outside_is_met_already():
    assert waves({"web": ("elsewhere",)}) == (("web",),)


def test_a_cycle_is_named_in_full():
    assert cycle({"a": ("b",), "b": ("c",), "c": ("b",)}) == ("b", "c", "b")
    assert cycle({"a": ("a",)}) == ("a", "a")
    assert cycle({"a": ("b", "c"), "b": ("d",), "c": ("d",), "d": ()}) == ()


def test_a_chain_as_long_as_a_manifest_may_be_is_walked():
    chain = {f"s{n:04}": (f"s{n + 1:04}",) for n in range(1000)}
    assert cycle(chain) == ()
    assert len(waves(chain)) == 1000
    chain["s1000"] = ("s0000",)
    assert len(cycle(chain)) == 1002


def test_the_longest_chain_counts_not_the_sum():
    needs = {"web": ("api", "cache"), "api": ("db",), "cache": (), "db": ()}
    weight = {"web": 10, "api": 20, "cache": 500, "db": 40}
    assert longest_ms(needs, weight.__getitem__) == 510


@given(graphs)
def test_waves_place_everything_exactly_where_there_is_no_cycle(needs):
    placed = [name for level in waves(needs) for name in level]
    assert len(placed) == len(set(placed))
    ring = cycle(needs)
    acyclic = {name: tuple(n for n in on if n != name) for name, on in needs.items()}
    if cycle(acyclic):
        assert set(placed) < set(needs)
    else:
        assert set(placed) == set(needs)
    if ring:
        assert ring[0] == ring[-1]
        assert all(after in needs[before]
                   for before, after in pairwise(ring))


@given(graphs)
def test_nothing_starts_before_what_it_needs(needs):
    level_of = {name: n for n, level in enumerate(waves(needs)) for name in level}
    for name, level in level_of.items():
        assert all(level_of[n] < level for n in needs[name] if n in level_of and n != name)
