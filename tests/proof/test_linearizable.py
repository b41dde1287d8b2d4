"""The checker of histories: what it must accept, and what it must not."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.proof.history import Kind, Operation, load, save
from tests.proof.linearizable import (
    Model,
    Register,
    Undecided,
    VersionedRegister,
    check,
    check_clock,
)


def write(value: str, invoked: float, returned: float | None, version: int = 0) -> Operation:
    return Operation(key="k", kind="write", value=value, invoked=invoked, returned=returned,
                     version=version)


def read(value: str, invoked: float, returned: float | None, version: int = 0) -> Operation:
    return Operation(key="k", kind="read", value=value, invoked=invoked, returned=returned,
                     version=version)


ACCEPTED: dict[str, list[Operation]] = {
    "nothing happened": [],
    "a read of what was never written is absent": [read("", 0, 1)],
    "one after the other": [write("a", 0, 1), read("a", 2, 3), write("b", 4, 5), read("b", 6, 7)],
    "a read beside a write sees the old or the new": [
        write("a", 0, 1), write("b", 2, 9), read("b", 3, 4), read("b", 5, 6)],
    "the old is seen until the new was": [
        write("a", 0, 1), write("b", 2, 9), read("a", 3, 4), read("b", 5, 6)],
    "writes side by side in either order": [
        write("a", 0, 5), write("b", 1, 4), read("a", 6, 7), read("a", 8, 9)],
    "an open write takes effect late": [
        write("a", 0, 1), write("b", 2, None), read("a", 3, 4), read("b", 50, 51)],
    "an open write never takes effect": [
        write("a", 0, 1), write("b", 2, None), read("a", 50, 51)],
    "an open read says nothing": [write("a", 0, 1), read("zzz", 2, None)],
    "what touches at one instant is concurrent": [write("a", 0, 1), read("", 1, 2)],
}
REFUSED: dict[str, list[Operation]] = {
    "a read of what nobody wrote": [read("a", 0, 1)],
    "a stale read": [write("a", 0, 1), write("b", 2, 3), read("a", 4, 5)],
    "a lost write": [write("a", 0, 1), read("", 2, 3)],
    "the new is seen, then the old again": [
        write("a", 0, 1), write("b", 2, 9), read("b", 3, 4), read("a", 5, 6)],
    "two readers see two orders": [
        write("a", 0, 5), write("b", 1, 4), read("a", 6, 7), read("b", 8, 9)],
    "a write is read before it was asked for": [read("a", 0, 1), write("a", 2, None)],
    "an open write comes and goes": [
        write("a", 0, 1), write("b", 2, None), read("b", 3, 4), read("a", 5, 6)],
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepts(name: str) -> None:
    assert check(ACCEPTED[name], Register()).ok


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    verdict = check(REFUSED[name], Register())
    assert not verdict.ok
    assert verdict.key == "k"
    assert verdict.stuck


def test_a_version_tells_a_write_applied_twice_and_one_that_was_lost() -> None:
    twice = [write("a", 0, 1, 1), read("a", 2, 3, 2)]
    assert check(twice, Register()).ok
    assert not check(twice, VersionedRegister()).ok
    lost = [write("a", 0, 5, 1), write("b", 0, 5, 1), read("b", 6, 7, 1)]
    assert check(lost, Register()).ok
    assert not check(lost, VersionedRegister()).ok


def test_an_open_write_fills_a_version_that_nobody_acknowledged() -> None:
    history = [write("a", 0, 1, 1), write("b", 2, None), write("c", 3, 4, 3), read("c", 5, 6, 3)]
    assert check(history, VersionedRegister()).ok
    history[1] = write("b", 4.5, None)  # it began too late for that
    assert not check(history, VersionedRegister()).ok


def test_keys_are_looked_at_one_by_one_and_the_bad_one_is_named() -> None:
    other = [replace(each, key="other") for each in REFUSED["a stale read"]]
    verdict = check([*ACCEPTED["one after the other"], *other], Register())
    assert verdict.key == "other"
    assert "other a" in str(verdict)


def test_values_must_name_their_write() -> None:
    with pytest.raises(ValueError, match="written twice"):
        check([write("a", 0, 1), write("a", 2, 3)], Register())


def test_a_search_without_end_is_given_up_and_is_no_verdict() -> None:
    many = [write(str(n), 0, 100) for n in range(20)]
    with pytest.raises(Undecided):
        check([*many, read("never", 101, 102)], Register(), limit=1000)


def test_fifty_open_writes_cost_nothing() -> None:
    opened = [write(f"open-{n}", n, None) for n in range(50)]
    acked = [write(f"{n}", 100 + n, 100.5 + n, 25 + n) for n in range(100)]
    history = [*opened, *acked, read("99", 300, 301, 124)]
    assert check(history, VersionedRegister(), limit=20_000).ok


@st.composite
def arbitrary(draw: st.DrawFn, most: int = 5) -> list[Operation]:
    """Few operations with any times and any answers."""
    values = ["", *(f"w{n}" for n in range(most))]
    made = []
    for number in range(draw(st.integers(1, most))):
        kind: Kind = draw(st.sampled_from(("read", "write")))
        invoked = draw(st.integers(0, 8))
        returned = draw(st.none() | st.integers(invoked, 9))
        value = f"w{number}" if kind == "write" else draw(st.sampled_from(values))
        version = 0 if returned is None else draw(st.integers(0, 3))
        made.append(Operation(key="k", kind=kind, value=value, invoked=invoked, returned=returned,
                              version=version))
    return made


def by_trying_all(history: Sequence[Operation], model: Model[tuple[int, str]]) -> bool:
    """The definition, read out: some order of all that was answered and some of what is open."""
    open_ = [each for each in history if each.returned is None]
    done = [each for each in history if each.returned is not None]
    for count in range(len(open_) + 1):
        for some in itertools.combinations(open_, count):
            if any(_legal(order, model) for order in itertools.permutations([*done, *some])):
                return True
    return False


def _legal(order: Sequence[Operation], model: Model[tuple[int, str]]) -> bool:
    for at, one in enumerate(order):
        if any(o.returned is not None and o.returned < one.invoked for o in order[at + 1:]):
            return False
    state = model.initial
    for one in order:
        if one.kind == "read" and one.returned is None:
            continue
        new = model.step(state, one)
        if new is None:
            return False
        state = new
    return True


@settings(max_examples=400, deadline=None)
@given(arbitrary())
def test_the_search_says_what_trying_all_orders_says(history: list[Operation]) -> None:
    model = VersionedRegister()
    assert check(history, model).ok is by_trying_all(history, model)


class Sequential:
    """A single copy with concurrent clients; `fault` is done to the write of that number."""

    def __init__(self, seed: int, clients: int, open_share: float) -> None:
        self.random = random.Random(seed)
        self.open_share, self.clients = open_share, clients
        self.now, self.version, self.value, self.writes = 0.0, 0, "", 0
        self.history: list[Operation] = []
        self.ghosts: list[Operation] = []
        self.fault: tuple[int, str] = (0, "")

    def run(self, steps: int) -> list[Operation]:
        begun: dict[int, Operation] = {}
        effected: dict[int, Operation] = {}
        for _ in range(steps):
            self.now += 1
            client = self.random.randrange(self.clients)
            if self.ghosts and self.random.random() < 0.1:
                self._effect(self.ghosts.pop(self.random.randrange(len(self.ghosts))))
            if client in effected:
                self._end(effected.pop(client))
            elif client in begun:
                operation = begun.pop(client)
                if self.random.random() < self.open_share:
                    self.history.append(operation)
                    self.ghosts.append(operation)
                else:
                    effected[client] = self._effect(operation)
            else:
                begun[client] = self._begin(client)
        for operation in [*effected.values(), *(self._effect(each) for each in begun.values())]:
            self._end(operation)
        self._end(self._effect(read("", self.now + 1, None)))
        return self.history

    def _begin(self, client: int) -> Operation:
        if self.random.random() < 0.5:
            return replace(read("", self.now, None), client=str(client))
        return replace(write(f"{client}-{self.now:g}", self.now, None), client=str(client))

    def _effect(self, operation: Operation) -> Operation:
        if operation.kind == "read":
            return replace(operation, value=self.value, version=self.version)
        self.writes += 1
        number, fault = self.fault
        answered = self.version + 1
        if number != self.writes or fault != "lost":
            self.version, self.value = answered, operation.value
        if number == self.writes and fault == "twice":
            self.version += 1
        return replace(operation, version=answered)

    def _end(self, operation: Operation) -> None:
        self.now += 1
        self.history.append(replace(operation, returned=self.now))


seeds = st.integers(0, 2**32)


@settings(max_examples=150, deadline=None)
@given(seeds, st.integers(1, 6), st.sampled_from((0.0, 0.1, 0.4)), st.integers(0, 200))
def test_accepts_whatever_a_single_copy_shows(
    seed: int, clients: int, open_share: float, steps: int
) -> None:
    history = Sequential(seed, clients, open_share).run(steps)
    assert check(history, VersionedRegister()).ok
    assert check(history, Register()).ok


@settings(max_examples=150, deadline=None)
@given(seeds, st.integers(1, 6), st.sampled_from(("lost", "twice")), st.integers(1, 8))
def test_refuses_a_write_that_was_lost_or_applied_twice(
    seed: int, clients: int, fault: str, number: int
) -> None:
    copy = Sequential(seed, clients, 0.0)
    copy.fault = (number, fault)
    history = copy.run(120)
    assert copy.writes >= number
    assert not check(history, VersionedRegister()).ok


@settings(max_examples=150, deadline=None)
@given(seeds, st.integers(1, 6), st.sampled_from((0.0, 0.3)))
def test_refuses_a_read_that_is_stale(seed: int, clients: int, open_share: float) -> None:
    history = Sequential(seed, clients, open_share).run(120)
    writes = [each for each in history if each.kind == "write" and each.returned is not None]
    last = max(writes, key=lambda each: each.version)
    assert last.returned is not None
    ending = max(each.returned or each.invoked for each in history)
    older = next((w for w in writes if w.version < last.version), None)
    stale = read("" if older is None else older.value, ending + 1, ending + 2,
                 0 if older is None else older.version)
    assert not check([*history, stale], VersionedRegister()).ok
    assert not check([*history, stale], Register()).ok


def test_the_clock_of_the_log_never_runs_back_over_all_keys() -> None:
    one = Operation(key="a", kind="write", value="1", invoked=0, returned=1, index=7)
    later = Operation(key="b", kind="read", invoked=2, returned=3, index=7)
    assert check_clock([one, later]).ok
    assert not check_clock([one, replace(later, index=6)]).ok
    assert check_clock([one, replace(later, index=6, invoked=0.5)]).ok
    assert not check_clock([one, replace(later, kind="write")]).ok
    assert not check_clock([one, replace(later, kind="write", invoked=0.5)]).ok


def test_a_history_comes_back_from_its_file(tmp_path: Path) -> None:
    history = Sequential(1, 3, 0.2).run(60)
    save(tmp_path / "there" / "history.jsonl", history)
    assert load(tmp_path / "there" / "history.jsonl") == history
