"""`validate` and `fmt` on real files."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from reconciler.language.read import read_manifest
from reconciler.language.spec import spec_hash
from tests.cli.conftest import Mill

GOOD = 'service "web" {\n  image = "registry.test/web:v1"\n  port  = 3000\n}\n'
UGLY = '# why\nservice "web" {\n image="registry.test/web:v1"\n   port = 3000 # here\n}\n'
BAD = 'service "x" { imag = "y"; cpu = "a" }\n'


def test_valid_manifest(offline: Mill) -> None:
    offline.write("app.mill", GOOD)
    result = offline("validate", "-f", "app.mill")
    assert (result.code, result.out, result.err) == (0, "  valid: 1 service in 1 file\n", "")


def test_every_mistake_is_shown_with_its_place_and_line(offline: Mill) -> None:
    offline.write("bad.mill", BAD)
    result = offline("validate", "-f", "bad.mill")
    assert (result.code, result.out) == (2, "")
    lines = result.err.splitlines()
    assert [line for line in lines if line.startswith("  at ")] == [
        "  at bad.mill:1:1", "  at bad.mill:1:15", "  at bad.mill:1:33"]
    assert lines[6:11] == [
        "error: unknown attribute `imag`",
        "  at bad.mill:1:15",
        '  1 | service "x" { imag = "y"; cpu = "a" }',
        "    |               ^",
        "hint: did you mean `image`?",
    ]


def test_json_of_an_invalid_manifest_is_one_document(offline: Mill) -> None:
    offline.write("bad.mill", BAD)
    result = offline("validate", "-f", "bad.mill", "--json")
    document = json.loads(result.out)
    assert (result.code, result.err) == (2, "")
    assert list(document) == ["errors", "services", "tasks"]
    assert document["errors"][1] == {
        "file": "bad.mill", "line": 1, "column": 15, "message": "unknown attribute `imag`",
        "hint": "did you mean `image`?"}
    assert document["services"] == []


def test_json_of_a_valid_manifest_has_hashes_in_the_order_of_the_file(offline: Mill) -> None:
    text = GOOD.replace("web", "zoo") + GOOD + 'task "a" {\n  image = "r/a"\n}\n'
    offline.write("app.mill", text)
    result = offline("--json", "validate", "-f", "app.mill")
    document = json.loads(result.out)
    specs = read_manifest({"app.mill": text.encode()}).in_order()
    assert (result.code, document["errors"]) == (0, [])
    assert document["services"] == [
        {"name": spec.name, "hash": spec_hash(spec)} for spec in specs[:2]]
    assert [one["name"] for one in document["services"]] == ["zoo", "web"]
    assert document["tasks"] == [{"name": "a", "hash": spec_hash(specs[2])}]


def test_what_is_not_built_yet_is_a_warning_at_its_place(offline: Mill) -> None:
    offline.write("app.mill", GOOD + 'task "a" {\n  image = "r/a"\n}\n')
    assert offline("validate").lines == [
        "  warning: app.mill:5:1: not built yet: tasks", "  valid: 1 service, 1 task in 1 file"]


def test_default_is_mill_mill_or_else_every_file_here(offline: Mill) -> None:
    offline.write("a.mill", GOOD)
    offline.write("b.mill", GOOD.replace("web", "api"))
    offline.write("notes.txt", "not a manifest")
    assert offline("validate").out == "  valid: 2 services in 2 files\n"
    offline.write("mill.mill", GOOD.replace("web", "one"))
    assert offline("validate").out == "  valid: 1 service in 1 file\n"
    assert "3 services in 3 files" in offline("validate", "-f", ".").out


def test_folder_without_manifests_is_refused(offline: Mill) -> None:
    result = offline("validate")
    assert result.code == 2
    assert result.err.splitlines() == ["error: there is no .mill file here",
                                       "hint: name one with -f PATH"]


def test_variables_of_the_call_override_those_of_the_file(offline: Mill) -> None:
    offline.write("app.mill", 'variables {\n  tag = "v1"\n}\n' + GOOD.replace(":v1", ":${var.tag}"))
    one = json.loads(offline("validate", "--json").out)
    two = json.loads(offline("validate", "--json", "--var", "tag=v2").out)
    assert one["services"][0]["hash"] != two["services"][0]["hash"]


@pytest.mark.parametrize("data", [b"\xff\xfe", b"service \x00", b"x" * 300_000])
def test_hostile_files_are_told_and_printed_harmlessly(offline: Mill, data: bytes) -> None:
    Path("app.mill").write_bytes(b'service "\x1b[31m" {}' + data)
    for command in ("validate", "fmt"):
        result = offline(command)
        assert result.code == 2
        assert result.err.replace("\n", "").isprintable()
        assert "app.mill:1:" in result.err


def test_fmt_rewrites_in_place_and_a_second_time_changes_nothing(offline: Mill) -> None:
    path = offline.write("app.mill", UGLY)
    path.chmod(0o640)
    assert offline("fmt", "app.mill").lines == ["app.mill"]
    text = path.read_text()
    assert "# why" in text
    assert "# here" in text
    assert text != UGLY
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert offline("fmt", "app.mill").out == ""
    assert path.read_text() == text
    assert [p.name for p in Path().iterdir()] == ["app.mill"]


def test_fmt_check_names_files_and_changes_nothing(offline: Mill) -> None:
    ugly = offline.write("ugly.mill", UGLY)
    offline.write("good.mill", GOOD)
    result = offline("fmt", "--check", "good.mill", "ugly.mill")
    assert (result.code, result.lines) == (1, ["ugly.mill"])
    assert ugly.read_text() == UGLY
    assert offline("fmt", "--check", "good.mill").code == 0


def test_fmt_leaves_what_does_not_parse_untouched(offline: Mill) -> None:
    broken = offline.write("broken.mill", 'service "web" {\n  image =\n}\n')
    ugly = offline.write("ugly.mill", UGLY)
    result = offline("fmt", ".")
    assert result.code == 2
    assert "  at broken.mill:2:" in result.err
    assert broken.read_text() == 'service "web" {\n  image =\n}\n'
    assert ugly.read_text() != UGLY


def test_fmt_rewrites_what_a_link_points_to(offline: Mill) -> None:
    real = offline.write("real.mill", UGLY)
    Path("link.mill").symlink_to(real)
    assert offline("fmt", "link.mill").code == 0
    assert Path("link.mill").is_symlink()
    assert real.read_text() != UGLY
