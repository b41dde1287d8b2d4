"""What is asked again after a change of leader, and what never is."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from starlette.responses import Response

from reconciler.api import again
from reconciler.api.again import LeaderLeft, until_taken
from reconciler.api.problems import NoLeader, problem_response
from reconciler.errors import MillError
from reconciler.executor.ledger import Ledger
from reconciler.fsm import commands as c
from reconciler.log.errors import NotLeader, OutcomeUnknown
from tests.replica import MemoryReplica, memory_ledger


class Deposed(MemoryReplica):
    """Takes entries, and then answers with what `errors` holds."""

    errors: list[MillError]

    async def propose(self, command: bytes, timeout_s: float = 10.0) -> tuple[int, object]:
        if self.errors:
            raise self.errors.pop()
        return await super().propose(command, timeout_s)


def deposed(*errors: MillError) -> tuple[Ledger, Deposed]:
    ledger, replica = memory_ledger()
    replica.__class__ = Deposed
    assert isinstance(replica, Deposed)
    replica.errors = list(errors)
    return ledger, replica


SECRET = c.SetSecret("s", b"0" * 12, b"x")
PIECE = c.StoreSpec("hash", 0, 2, b"x")


async def test_what_was_not_written_is_asked_again() -> None:
    ledger, replica = deposed(NotLeader("node-2"), NotLeader())

    async def once() -> Response:
        await ledger.propose(SECRET)
        return Response("done")

    assert (await until_taken(once, alone=True)).body == b"done"
    assert len(replica.entries) == 1


async def test_an_unknown_outcome_is_never_asked_again() -> None:
    ledger, _ = deposed(OutcomeUnknown("deposed"))
    calls = 0

    async def once() -> Response:
        nonlocal calls
        calls += 1
        await ledger.propose(SECRET)
        return Response("done")

    with pytest.raises(OutcomeUnknown):
        await until_taken(once, alone=True)
    assert calls == 1


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("first", [None, OutcomeUnknown("deposed")])
async def test_what_had_written_something_is_not_asked_again_nor_by_who_forwarded_it(
    alone: bool, first: MillError | None
) -> None:
    """As a handler that writes, and then reads where nobody leads any more."""
    ledger, replica = deposed(*([first] if first else []))

    async def once() -> Response:
        with contextlib.suppress(OutcomeUnknown):
            await ledger.propose(SECRET)
        raise NotLeader

    with pytest.raises(LeaderLeft, match="SetSecret") as left:
        await until_taken(once, alone=alone)
    assert not again.is_unwritten(problem_response(left.value))
    assert len(replica.entries) == (0 if first else 1)


async def test_pieces_of_a_spec_are_written_again() -> None:
    ledger, replica = deposed()
    errors: list[MillError] = [NotLeader()]

    async def once() -> Response:
        await ledger.propose(PIECE)
        if errors:
            raise errors.pop()
        return Response("done")

    assert (await until_taken(once, alone=True)).body == b"done"
    assert len(replica.entries) == 2


@pytest.mark.parametrize(("error", "calls"), [
    (NotLeader(), 2), (NoLeader("no leader right now"), 2), (OutcomeUnknown("deposed"), 1),
    (LeaderLeft("it went"), 1),
])
async def test_another_nodes_answer_is_judged_by_its_kind(error: MillError, calls: int) -> None:
    asked = 0

    async def once() -> Response:
        nonlocal asked
        asked += 1
        return problem_response(error) if asked == 1 else Response("done")

    answer = await until_taken(once, alone=True)
    assert asked == calls
    assert (answer.body == b"done") is (calls == 2)


async def test_without_a_leader_it_is_said_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(again, "AGAIN_S", 0.2)

    async def once() -> Response:
        raise NotLeader

    with pytest.raises(NotLeader):
        await until_taken(once, alone=True)


def test_only_problems_are_taken_for_such() -> None:
    assert not again.is_unwritten(Response(b"not json", 503))
    assert not again.is_unwritten(Response(msgspec.json.encode({"type": 7}), 503))
    assert not again.is_unwritten(Response(
        msgspec.json.encode({"type": "urn:mill:problem:no-leader"}), 200))
