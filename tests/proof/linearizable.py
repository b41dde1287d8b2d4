"""Is there one order of these operations that a single copy of the data could have shown?

The search is Wing and Gong's ("Testing and Verifying Concurrent Objects", 1993) with Lowe's memory
of configurations ("Testing for Linearizability", 2017), one key at a time: a history is
linearizable where that of each key is (Herlihy and Wing 1990, locality; Horn and Kroening,
"Faster Linearizability Checking via P-Compositionality", 2015).

An operation without an answer may take effect at any time after its beginning, or never.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from msgspec.structs import replace

from tests.proof.history import Operation

S = TypeVar("S", bound=Hashable)

MAX_CONFIGURATIONS = 2_000_000  # some hundred MB; a history that needs more is not decided


class Model(Protocol[S]):
    """One object, sequentially."""

    @property
    def initial(self) -> S:
        """Before the first operation."""
        ...

    def step(self, state: S, operation: Operation) -> S | None:
        """The state after it; None where it could not have answered so in `state`."""
        ...


class Register:
    """A value that is read and written."""

    initial = ""

    def step(self, state: str, operation: Operation) -> str | None:
        """A read answers the last value written."""
        if operation.kind == "write":
            return operation.value
        return state if operation.value == state else None


class VersionedRegister:
    """A value whose writes are counted, and whose answers name the count: the place of a write in
    the order. A write that is lost or applied twice shows even where its value does not."""

    initial = (0, "")

    def step(self, state: tuple[int, str], operation: Operation) -> tuple[int, str] | None:
        """A write is one version further; a read answers version and value."""
        version, value = state
        if operation.kind == "write":
            if operation.version not in (0, version + 1):
                return None
            return (version + 1, operation.value)
        if (operation.version, operation.value) != (version, value):
            return None
        return state


class Undecided(Exception):
    """The search was given up: it says nothing of the history."""


@dataclass(frozen=True)
class Verdict:
    """`ok`, or the key, and the operations at the point past which no order could be found."""

    ok: bool
    key: str = ""
    stuck: tuple[Operation, ...] = ()
    placed: int = 0

    def __str__(self) -> str:
        if self.ok:
            return "linearizable"
        lines = "\n  ".join(str(each) for each in self.stuck)
        return (f"not linearizable: {self.key}: after {self.placed} operations none of these can "
                f"come next, or no order of them works:\n  {lines}")


def check(
    history: Iterable[Operation], model: Model[S], limit: int = MAX_CONFIGURATIONS
) -> Verdict:
    """Look at each key; the first that has no order is the verdict. Raises Undecided.

    Values are written at most once to a key (ValueError): so a read names the write that it saw.
    """
    keys: dict[str, list[Operation]] = defaultdict(list)
    for operation in history:
        keys[operation.key].append(operation)
    for key in sorted(keys):
        verdict = _Search(_settled(key, keys[key]), model, limit).run(key)
        if not verdict.ok:
            return verdict
    return Verdict(True)


def check_clock(history: Iterable[Operation]) -> Verdict:
    """The log's index is the cluster's clock: over all keys, what begins after an answer with
    index i has a later index (a write) or no earlier one (a read); no two writes share one."""
    known = [each for each in history if each.returned is not None and each.index]
    ended = sorted(known, key=lambda each: each.returned or 0.0)
    at, newest = 0, None
    writers: dict[int, Operation] = {}
    for operation in sorted(known, key=lambda each: each.invoked):
        while at < len(ended) and (ended[at].returned or 0.0) < operation.invoked:
            if newest is None or ended[at].index > newest.index:
                newest = ended[at]
            at += 1
        least = 0 if newest is None else newest.index + (operation.kind == "write")
        if newest is not None and operation.index < least:
            return Verdict(False, operation.key, (newest, operation))
        if operation.kind == "write":
            twin = writers.setdefault(operation.index, operation)
            if twin is not operation:
                return Verdict(False, operation.key, (twin, operation))
    return Verdict(True)


def _settled(key: str, operations: list[Operation]) -> list[Operation]:
    """Open reads are dropped, for they say nothing. An open write whose value was read did take
    effect, before the end of the first such read and as the version that it names."""
    written = [each.value for each in operations if each.kind == "write"]
    if len(set(written)) != len(written):
        raise ValueError(f"{key}: a value was written twice, so reads do not name their write")
    seen: dict[str, Operation] = {}
    for each in operations:
        if each.kind == "read" and each.returned is not None:
            first = seen.setdefault(each.value, each)
            if first.returned is not None and each.returned < first.returned:
                seen[each.value] = each
    settled = []
    for each in operations:
        if each.returned is None and each.kind == "read":
            continue
        if each.returned is None and each.value in seen:
            reader = seen[each.value]
            assert reader.returned is not None
            end = max(reader.returned, each.invoked)  # read before it was written: left to fail
            settled.append(replace(each, returned=end, version=reader.version))
        else:
            settled.append(each)
    return settled


class _Search(Generic[S]):
    """One key's calls and returns as a doubly linked list, in time; a call that is placed in the
    order is lifted out together with its return, and put back where the search turns round."""

    def __init__(self, operations: Sequence[Operation], model: Model[S], limit: int) -> None:
        self._model, self._limit = model, limit
        self._operations = sorted(operations, key=lambda each: each.invoked)
        # At the same instant calls come first: the two are then concurrent, which allows more.
        events = sorted(
            [(each.invoked, 0, i) for i, each in enumerate(self._operations)]
            + [(each.returned, 1, i) for i, each in enumerate(self._operations)
               if each.returned is not None])
        self._is_return = [False, *(kind == 1 for _, kind, _ in events), True]
        self._of = [-1, *(i for _, _, i in events), -1]
        self._end = len(events) + 1
        self._next = list(range(1, self._end + 2))
        self._previous = list(range(-1, self._end))
        self._return_of = {i: at for at, i in enumerate(self._of) if self._is_return[at] and i >= 0}
        self._twin = self._twins()

    def run(self, key: str) -> Verdict:
        """Depth first, the earliest call first."""
        state, mask, left = self._model.initial, 0, len(self._return_of)
        known, stack = {(mask, state)}, list[tuple[int, int, S]]()
        entry, best = self._next[0], Verdict(False, key, self._front(0), 0)
        while left:
            if self._is_return[entry]:  # its operation had to be placed before
                if len(stack) >= best.placed:
                    best = Verdict(False, key, self._front(self._of[entry]), len(stack))
                if not stack:
                    return best
                entry, mask, state = stack.pop()
                left += self._put_back(entry)
                entry = self._next[entry]
                continue
            i = self._of[entry]
            new = self._step(i, mask, state)
            if new is None or (mask | 1 << i, new) in known:
                entry = self._next[entry]
                continue
            known.add((mask | 1 << i, new))
            if len(known) > self._limit:
                raise Undecided(f"{key}: over {self._limit} configurations")
            stack.append((entry, mask, state))
            left -= self._lift(entry)
            mask, state, entry = mask | 1 << i, new, self._next[0]
        return Verdict(True)

    def _step(self, i: int, mask: int, state: S) -> S | None:
        twin = self._twin.get(i)
        if twin is not None and not mask >> twin & 1:
            return None
        return self._model.step(state, self._operations[i])

    def _twins(self) -> dict[int, int]:
        """Open writes (that nobody read) differ in their beginning alone, so that an order that
        uses some of them exists with the earliest: each waits for the one before it."""
        open_ = [i for i, each in enumerate(self._operations) if each.returned is None]
        return dict(zip(open_[1:], open_, strict=False))

    def _lift(self, entry: int) -> int:
        """Take a call and its return out; 1 where it has a return."""
        back = self._return_of.get(self._of[entry])
        for at in (entry,) if back is None else (entry, back):
            self._next[self._previous[at]] = self._next[at]
            self._previous[self._next[at]] = self._previous[at]
        return back is not None

    def _put_back(self, entry: int) -> int:
        back = self._return_of.get(self._of[entry])
        for at in (entry,) if back is None else (back, entry):
            self._next[self._previous[at]] = at
            self._previous[self._next[at]] = at
        return back is not None

    def _front(self, last: int) -> tuple[Operation, ...]:
        """The calls that could come next, up to the return that could not."""
        front, at = [], self._next[0]
        while at != self._end and not self._is_return[at]:
            front.append(self._operations[self._of[at]])
            at = self._next[at]
        return tuple(front) or (self._operations[last],) if self._operations else ()
