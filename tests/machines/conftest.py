"""Machines of a lab, for tests that form clusters of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.end_to_end.conftest import needs_containers
from tests.machines.cluster import Machines, machines, published


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if needs_containers():
        pytest.skip(needs_containers())
    return published(tmp_path_factory.mktemp("registry"))


@pytest.fixture
def form(tmp_path: Path, images: Path) -> Iterator[Callable[[int], Machines]]:
    """`form(N)`: N machines, of which the first K asked for are nodes already."""
    with ExitStack() as stack:
        yield lambda count: stack.enter_context(machines(count, tmp_path, images))
