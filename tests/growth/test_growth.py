"""A long past weighs nothing: the state, the snapshot and the start are those of what lives."""

from __future__ import annotations

from pathlib import Path

from tests.growth.history import growing, opened_s

FULL = 1_200
"""Deploys after which all that is kept for a while is there: 10,000 events take the longest."""


async def test_a_state_after_twice_as_many_deploys_is_no_larger(tmp_path: Path) -> None:
    async with growing(tmp_path) as history:
        await history.begin()
        while history.deploys < FULL:
            await history.deploy()
        before, entries = history.state_bytes(), history.ledger.state.index
        while history.deploys < 2 * FULL:
            await history.deploy()
        state = history.ledger.state
        assert state.index > 1.9 * entries
        assert history.state_bytes() < 1.1 * before
        assert len(state.deploys) < 400  # a day's and the hour until the next trim
        assert len(state.allocations) < 400
        assert len(state.specs) < 400
    took_s, _ = await opened_s(tmp_path)
    assert took_s < 60  # it starts at all; how fast is measured in `make soak`
