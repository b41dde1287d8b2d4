"""What is thrown away on a node is what nobody needed twice."""

from __future__ import annotations

from reconciler.executor.agent.runtime import Idle


def test_what_looks_left_over_once_stays() -> None:
    idle = Idle()
    assert idle.take({"just-ordered", "old"}) == []
    assert idle.take({"old"}) == ["old"]


def test_what_was_needed_in_between_stays() -> None:
    idle = Idle()
    idle.take({"a"})
    idle.take(set())
    assert idle.take({"a"}) == []
