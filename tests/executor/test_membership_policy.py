"""What the leader changes about the log's members: a pure function, and whole histories of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from reconciler.executor.membership import (
    DOWN_MS,
    AddLearner,
    Demote,
    Handover,
    Promote,
    Remove,
    Step,
    next_change,
    wanted_voters,
)
from reconciler.fsm.records import Node
from reconciler.fsm.state import State
from reconciler.log import configuration
from reconciler.log.configuration import Progress, changed
from reconciler.log.settings import Member, Membership

NOW_MS = 10_000_000
INDEX = 1_000


def node(number: int, **fields: object) -> Node:
    return Node(**{  # type: ignore[arg-type]  # the test names the fields
        "name": f"n{number}", "number": number, "api": "", "agent": "", "cpu_milli": 1,
        "memory_bytes": 1, "log": f"10.0.0.{number}:4401", **fields})


def member(number: int) -> Member:
    return Member(f"n{number}", f"10.0.0.{number}", 4401)


@dataclass
class Cluster:
    """Nodes of the state, members of the log, and who of them lives and follows."""

    nodes: dict[str, Node]
    membership: Membership
    me: str = "n1"
    dead: frozenset[str] = frozenset()
    behind: frozenset[str] = frozenset()
    steps: list[Step] = field(default_factory=list)

    def next(self) -> Step | None:
        progress = {
            m.name: Progress(0 if m.name in self.behind else INDEX, 0.05 if up else 9.0, up)
            for m in self.membership.everyone if m.name != self.me
            for up in (m.name not in self.dead,)
        }
        state = State(cluster="test", nodes=self.nodes, index=INDEX)
        return next_change(state, self.membership, progress, self.me, NOW_MS)

    def take(self, step: Step) -> None:
        """As the log does it, with its own checks."""
        self.steps.append(step)
        if isinstance(step, Handover):
            assert self.membership.votes(step.to)
            assert step.to not in self.dead | self.behind
            self.me = step.to
            return
        before = {m.name for m in self.membership.voters}
        match step:
            case AddLearner(name, host, port):
                made = changed(self.membership, configuration.AddLearner(Member(name, host, port)))
            case Promote(name):
                assert name not in self.dead | self.behind, "the log refuses it"
                made = changed(self.membership, configuration.Promote(name))
            case Demote(name):
                made = changed(self.membership, configuration.Demote(name))
            case Remove(name):
                made = changed(self.membership, configuration.Remove(name))
        after = {m.name for m in made.voters}
        assert made is not self.membership, f"{step} changes nothing"
        assert len(before ^ after) <= 1
        assert self.me in after, "the leader demoted itself"
        assert 2 * len(after - self.dead) > len(after), "no majority of it lives"
        self.membership = made

    def settle(self, most: int = 80) -> list[Step]:
        """Until there is nothing to do; the steps."""
        began = len(self.steps)
        while (step := self.next()) is not None:
            assert len(self.steps) - began < most, f"no end: {self.steps[began:]}"
            self.take(step)
        return self.steps[began:]

    @property
    def voters(self) -> list[str]:
        return sorted(m.name for m in self.membership.voters)

    @property
    def learners(self) -> list[str]:
        return sorted(m.name for m in self.membership.learners)


def cluster(nodes: int, voters: tuple[int, ...] = (1,), learners: tuple[int, ...] = ()) -> Cluster:
    made = [node(number) for number in range(1, nodes + 1)]
    return Cluster({n.name: n for n in made},
                   Membership(tuple(map(member, voters)), tuple(map(member, learners))))


def set_node(c: Cluster, name: str, **fields: object) -> None:
    c.nodes[name] = replace(c.nodes[name], **fields)  # type: ignore[arg-type]  # the test names the fields


@pytest.mark.parametrize(("nodes", "voters"), [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (6, 5),
                                               (20, 5)])
def test_voters_are_the_largest_of_1_3_5_not_above_the_nodes(nodes: int, voters: int) -> None:
    c = cluster(nodes)
    c.settle()
    assert len(c.voters) == voters == wanted_voters(nodes)
    assert sorted([*c.voters, *c.learners]) == sorted(c.nodes)


def test_a_node_follows_before_it_votes_and_voters_come_in_twos() -> None:
    c = cluster(3)
    assert c.next() == AddLearner("n2", "10.0.0.2", 4401)
    c.behind = frozenset({"n3"})
    assert c.settle() == [AddLearner("n2", "10.0.0.2", 4401), AddLearner("n3", "10.0.0.3", 4401)]
    c.behind = frozenset()
    assert c.settle() == [Promote("n2"), Promote("n3")]


def test_one_of_two_that_came_is_not_sent_back() -> None:
    c = cluster(3, (1, 2), (3,))
    c.dead = frozenset({"n3"})
    assert c.settle() == []
    c.dead = frozenset()
    assert c.settle() == [Promote("n3")]


def test_a_removed_node_is_demoted_then_removed() -> None:
    c = cluster(3, (1, 2, 3))
    del c.nodes["n3"]
    assert c.settle() == [Demote("n3"), Remove("n3"), Demote("n2")]
    assert (c.voters, c.learners) == (["n1"], ["n2"])


def test_a_removed_voter_that_lives_makes_way_only_after_another_came() -> None:
    c = cluster(4, (1, 2, 3), (4,))
    del c.nodes["n3"]
    assert c.settle() == [Promote("n4"), Demote("n3"), Remove("n3")]


def test_nobody_is_demoted_on_the_word_of_a_voter_that_was_removed() -> None:
    """It ends as soon as it learns so: with n1 demoted, nothing would be committed ever again."""
    c = cluster(3, voters=(1, 2, 3))
    c.me, c.dead = "n3", frozenset({"n1"})
    del c.nodes["n2"]
    assert c.settle() == []
    c.dead = frozenset({"n2"})
    assert c.settle()[0] == Demote("n2")
    assert c.voters == ["n3"]


def test_a_leader_that_was_removed_hands_over_before_it_demotes_anybody() -> None:
    c = cluster(3, voters=(1, 2, 3))
    c.dead = frozenset({"n3"})
    del c.nodes["n1"]
    assert c.next() == Handover("n2")


def test_a_draining_voter_is_exchanged_where_another_has_caught_up() -> None:
    c = cluster(4, (1, 2, 3), (4,))
    c.behind = frozenset({"n4"})
    set_node(c, "n2", draining=True, status="draining")
    assert c.settle() == []
    c.behind = frozenset()
    assert c.settle() == [Promote("n4"), Demote("n2")]
    set_node(c, "n2", draining=False, status="ready")
    assert c.settle() == []


def test_a_voter_is_exchanged_once_it_is_down_for_long_and_makes_way_first() -> None:
    c = cluster(4, (1, 2, 3), (4,))
    c.dead = frozenset({"n2"})
    set_node(c, "n2", status="down", since_ms=NOW_MS - DOWN_MS)
    assert c.settle() == []
    set_node(c, "n2", since_ms=NOW_MS - DOWN_MS - 1)
    assert c.settle() == [Demote("n2"), Promote("n4")]
    c.dead = frozenset()
    set_node(c, "n2", status="ready", since_ms=NOW_MS)
    assert c.settle() == []


def test_a_voter_that_is_down_stays_where_nobody_could_take_its_place() -> None:
    c = cluster(3, (1, 2, 3))
    c.dead = frozenset({"n3"})
    set_node(c, "n3", status="down", since_ms=0)
    assert c.settle() == []


def test_a_leader_that_is_to_go_hands_over_and_never_votes_itself_out() -> None:
    c = cluster(4, (1, 2, 3), (4,))
    del c.nodes["n1"]
    assert c.settle() == [Promote("n4"), Handover("n4"), Demote("n1"), Remove("n1")] \
        or c.steps[:2] in ([Promote("n4"), Handover("n2")], [Promote("n4"), Handover("n3")])
    assert (c.voters, c.learners) == (["n2", "n3", "n4"], [])


def test_the_only_voter_can_be_removed_from_two_nodes() -> None:
    c = cluster(2, (1,), (2,))
    del c.nodes["n1"]
    assert c.settle() == [Promote("n2"), Handover("n2"), Demote("n1"), Remove("n1")]


def test_a_member_that_the_state_did_not_have_yet_is_left_alone() -> None:
    c = cluster(1, (1, 2, 3))
    founding = State(nodes=c.nodes, index=INDEX)
    assert next_change(founding, c.membership, {}, "n1", NOW_MS) is None


def test_a_node_without_a_log_takes_no_part() -> None:
    c = cluster(2)
    set_node(c, "n2", log="")
    assert c.settle() == []


def test_a_node_with_a_new_address_is_found_there() -> None:
    c = cluster(3, (1, 2, 3))
    set_node(c, "n3", log="[fd00::3]:4401")
    assert c.settle() == [AddLearner("n3", "fd00::3", 4401)]
    assert c.voters == ["n1", "n2", "n3"]


# -- any cluster --------------------------------------------------------------------------------

NUMBERS = range(1, 9)
STATES = st.sampled_from(["ready", "ready", "ready", "draining", "down", "long"])


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """Any members, any nodes, any of them dead or behind; a leader that a majority answers."""
    numbers = draw(st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=8, unique=True))
    voters = tuple(numbers[: draw(st.integers(1, min(6, len(numbers))))])
    learners = tuple(n for n in numbers if n not in voters and draw(st.booleans()))
    me = f"n{voters[0]}"
    nodes = {f"n{n}": node(n) for n in NUMBERS if draw(st.booleans())} or {"n1": node(1)}
    names = [f"n{n}" for n in NUMBERS]
    dead = frozenset(n for n in names if n != me and draw(st.integers(0, 3)) == 0)
    behind = frozenset(n for n in names if n != me and draw(st.integers(0, 3)) == 0)
    c = Cluster(nodes, Membership(tuple(map(member, voters)), tuple(map(member, learners))), me,
                dead, behind)
    for name in nodes:
        _set(c, name, draw(STATES))
    while 2 * len({f"n{n}" for n in voters} - c.dead) <= len(voters):
        c.dead -= {min(c.dead & {f"n{n}" for n in voters})}
    return c


def _set(c: Cluster, name: str, status: str) -> None:
    match status:
        case "draining":
            set_node(c, name, status="draining", draining=True)
        case "down" | "long":
            set_node(c, name, status="down", since_ms=NOW_MS - (0 if status == "down" else 99_999))
        case _:
            set_node(c, name, status="ready", draining=False)


@given(clusters())
def test_any_cluster_settles_and_every_step_keeps_a_living_majority(c: Cluster) -> None:
    c.settle()  # `take` checks each step
    assert {n for n, each in c.nodes.items() if each.log} <= {*c.voters, *c.learners}
    assert not set(c.learners) - c.nodes.keys()


@given(clusters())
def test_when_all_is_well_again_the_members_are_as_they_should_be(c: Cluster) -> None:
    c.settle()
    c.dead = c.behind = frozenset()
    for name in c.nodes:
        _set(c, name, "ready")
    c.settle()
    assert len(c.voters) == wanted_voters(len(c.nodes))
    assert {*c.voters, *c.learners} == set(c.nodes)


@given(clusters(), st.data())
def test_a_healthy_voter_is_never_demoted_without_need(c: Cluster, data: st.DataObject) -> None:
    while (step := c.next()) is not None:
        if isinstance(step, Demote) and c.nodes.get(step.name) is not None:
            fit = c.nodes[step.name].status == "ready"
            spare = len(c.voters) > wanted_voters(len({*c.voters, *c.learners} & c.nodes.keys()))
            assert spare or not fit
        c.take(step)


@given(clusters(), st.lists(st.tuples(st.integers(1, 8), st.sampled_from(["dead", "behind",
                                                                        "down"])), max_size=6))
def test_hiccups_shorter_than_a_minute_change_no_voter(
    c: Cluster, hiccups: list[tuple[int, str]]
) -> None:
    c.dead = c.behind = frozenset()
    for name in c.nodes:
        _set(c, name, "ready")
    c.settle()
    voters = c.voters
    for number, kind in hiccups:
        name = f"n{number}"
        if name == c.me or name not in c.nodes:
            continue
        c.dead = frozenset({name} if kind == "dead" and len(voters) > 2 else ())
        c.behind = frozenset({name} if kind == "behind" else ())
        _set(c, name, "down" if kind == "down" else "ready")
        assert c.settle() == []
        _set(c, name, "ready")
    assert c.voters == voters


@given(clusters(), st.data())
def test_another_leader_at_any_point_goes_on_to_the_same_end(
    c: Cluster, data: st.DataObject
) -> None:
    for _ in range(120):
        step = c.next()
        if step is None:
            break
        c.take(step)
        living = [n for n in c.voters if n not in c.dead | c.behind]
        if living and data.draw(st.integers(0, 4)) == 0:
            c.me = data.draw(st.sampled_from(living))
    assert c.next() is None
    wanted = wanted_voters(len({*c.voters, *c.learners} & c.nodes.keys()))
    staying = {n for n in c.voters if n in c.nodes}
    if staying != set(c.voters) and staying & (c.dead | c.behind):
        return  # one that was removed votes yet, and who stays has to come back first
    assert len(staying) <= max(wanted, 1)
