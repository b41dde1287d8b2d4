"""Tables and figures."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from reconciler.cli.output import cores, json_text, memory, table


def test_columns_are_aligned_and_lines_end_without_blanks() -> None:
    assert table(("A", "LONG"), [("one", "1"), ("two-more", "")]) == [
        "A         LONG", "one       1", "two-more"]


def test_quiet_is_the_names_alone() -> None:
    assert table(("A", "B"), [("one", "1"), ("two", "2")], quiet=True) == ["one", "two"]


@pytest.mark.parametrize(("count", "text"), [
    (512_000_000, "512M"), (1_500_000_000, "1.5G"), (2_000_000_000_000, "2T"), (10, "10")])
def test_memory_reads_as_manifests_write_it(count: int, text: str) -> None:
    assert memory(count) == text


@pytest.mark.parametrize(("count", "text"), [(0.5, "0.5"), (10, "10"), (0, "0"), (0.001, "0.001")])
def test_cores_read_as_manifests_write_them(count: float, text: str) -> None:
    assert cores(count) == text


@given(st.text())
@example("\x7f\x1b\x9b\u202e")
def test_json_is_whole_and_plain_ascii(text: str) -> None:
    written = json_text({"value": text})
    assert written.isprintable()
    assert written.isascii()
    assert json.loads(written) == {"value": text}
