"""Manifests in documents and examples are right, and the tables of the language are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reconciler.language import blocks
from reconciler.language.read import read_manifest
from reconciler.language.schema import Schema
from reconciler.language.spec import spec_hash
from reconciler.language.unbuilt import unbuilt
from reconciler.language.workloads import SERVICE, TASK
from tests.docs.pages import ROOT, Fence, fences, name, table

PAGE = "docs/language.md"
FOLDERS = sorted({path.parent for path in (ROOT / "examples").rglob("*.mill")})


@pytest.mark.parametrize("fence", fences("hcl"), ids=str)
def test_a_manifest_in_a_document_is_valid(fence: Fence) -> None:
    assert read_manifest({"doc.mill": fence.text.encode()}).problems == ()


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_an_example_is_valid_and_all_of_it_is_built(folder: Path) -> None:
    files = {path.name: path.read_bytes() for path in folder.glob("*.mill")}
    assert unbuilt(read_manifest(files).valid()) == []


# -- tables: every attribute, its example, default and range ------------------------------------

_TABLES: dict[str, tuple[str, Schema, str]] = {
    "service": ("## service", SERVICE, 'service "a" {{ image = "a"; port = 1; {} }}'),
    "health": ("### health", blocks._HEALTH,
               'service "a" {{ image = "a"; port = 1; health {{ {} }} }}'),
    "route": ("### route", blocks._ROUTE,
              'service "a" {{ image = "a"; port = 1; route "*" {{ {} }} }}'),
    "task": ("## task", TASK, 'task "a" {{ image = "a"; schedule = "0 3 * * *"; {} }}'),
}
_OF_TASK = ("timeout", "schedule", "timezone", "overlap", "run")
_ROWS = [(kind, row) for kind, (after, _, _) in _TABLES.items()
         for row in table(PAGE, "attribute", "type", after)]


def _bare(cell: str) -> str:
    return cell.strip("`")


def _with(kind: str, attribute: str, value: str) -> bytes:
    """A manifest with the attribute, and without the one that it would repeat."""
    frame = _TABLES[kind][2]
    frame = re.sub(rf" {attribute} = (\"[^\"]*\"|\d+);", "", frame)
    if attribute == "depends_on" and value != "[]":
        frame += '\nservice "api" {{ image = "a" }}'
    return frame.format(f"{attribute} = {value}").encode()


def _ids(value: object) -> str:
    return _bare(value["attribute"]) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("kind", _TABLES)
def test_a_table_lists_exactly_the_attributes_that_there_are(kind: str) -> None:
    after, schema, _ = _TABLES[kind]
    listed = [_bare(row["attribute"]) for row in table(PAGE, "attribute", "type", after)]
    known = set(_OF_TASK) if kind == "task" else set(schema.attributes)
    assert sorted(listed) == sorted(known)
    if kind == "task":
        assert set(schema.attributes) - known < set(SERVICE.attributes)


def test_the_blocks_that_are_not_built_are_listed_whole() -> None:
    rows = table(PAGE, "block", "attribute", "### file, listen, volume")
    known = {"file": blocks._FILE, "listen": blocks._LISTEN, "volume": blocks._VOLUME}
    listed = sorted((_bare(row["block"]), _bare(row["attribute"])) for row in rows)
    assert listed == sorted((kind, one) for kind, schema in known.items()
                            for one in schema.attributes)
    frames = {
        "file": 'file "/a" {{ {} }}', "listen": 'listen "tcp" {{ {} }}',
        "volume": 'volume "a" {{ {} }}',
    }
    rest = {"mode": 'content = "a"; ', "size": 'path = "/a"; ', "ephemeral": 'path = "/a"; ',
            "path": "ephemeral = true; "}
    for row in rows:
        attribute = _bare(row["attribute"])
        inner = rest.get(attribute, "") + f"{attribute} = {_bare(row['example'])}"
        block = frames[_bare(row["block"])].format(inner)
        text = f'service "a" {{ image = "a"; port = 1; {block} }}'
        assert read_manifest({"a.mill": text.encode()}).problems == (), text


@pytest.mark.parametrize(("kind", "row"), _ROWS, ids=_ids)
def test_an_example_of_the_table_is_valid(kind: str, row: dict[str, str]) -> None:
    text = _with(kind, _bare(row["attribute"]), _bare(row["example"]))
    assert read_manifest({"a.mill": text}).problems == ()


@pytest.mark.parametrize(
    ("kind", "row"), [(k, r) for k, r in _ROWS if r["default"].startswith("`")], ids=_ids)
def test_a_default_that_is_written_means_what_leaving_it_out_means(
    kind: str, row: dict[str, str]
) -> None:
    attribute = _bare(row["attribute"])
    written = read_manifest({"a.mill": _with(kind, attribute, _bare(row["default"]))}).in_order()
    absent = read_manifest({"a.mill": _TABLES[kind][2].format("").encode()}).in_order()
    assert [spec_hash(spec) for spec in written] == [spec_hash(spec) for spec in absent]


_TO = "\N{EN DASH}"
_OVER = {"number": ("{}", lambda low: f"{float(low) - 0.01:g}" if "." in low else str(int(low) - 1),
                    lambda high: str(int(high) + 1)),
         "size": ('"{}"', lambda low: f"{int(low[:-1]) - 1}{low[-1]}",
                  lambda high: f"{int(high[:-1]) + 1}{high[-1]}"),
         "duration": ('"{}"', lambda _: "0ms", lambda high: f"{int(high[:-1]) + 1}{high[-1]}")}


@pytest.mark.parametrize(
    ("kind", "row"), [(k, r) for k, r in _ROWS if _TO in r["range"]], ids=_ids)
def test_a_range_holds_to_its_ends_and_no_further(kind: str, row: dict[str, str]) -> None:
    attribute = _bare(row["attribute"])
    low, _, high = row["range"].split(",")[0].replace(" ", "").partition(_TO)
    shape, below, above = _OVER[row["type"]]
    for value, fits in ((low, True), (high, True), (below(low), False), (above(high), False)):
        text = _with(kind, attribute, shape.format(value))
        assert (read_manifest({"a.mill": text}).problems == ()) is fits, text


def test_what_the_page_calls_not_built_is_what_a_plan_refuses() -> None:
    refused = set()
    for kind, row in _ROWS:
        text = _with(kind, _bare(row["attribute"]), _bare(row["example"]))
        if kind == "service" and unbuilt(read_manifest({"a.mill": text}).manifest):
            refused.add(_bare(row["attribute"]))
    marked = {_bare(row["attribute"]) for kind, row in _ROWS
              if kind == "service" and "*not built*" in row["meaning"]}
    assert refused == marked
