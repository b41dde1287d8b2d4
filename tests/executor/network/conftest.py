"""Three machines, whose networks a test builds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.executor.network.world import World
from tests.machines.lab import Lab


@pytest.fixture
def world() -> Iterator[World]:
    with Lab(3) as lab:
        made = World(lab)
        try:
            yield made
        finally:
            made.sweep()
