"""Every command that a document shows exists, with its options."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from reconciler.cli.main import COMMANDS, cli
from reconciler.cli.settings import global_options
from tests.docs.pages import PAGES, ROOT, fences, inline, name, page, paragraphs

NOT_BUILT = ("exec", "spawn", "kill", "hotfix", "volume")
"""May be named where a paragraph says that they are not built."""

_GLOBAL = {flag for option in global_options(hidden=False) for flag in option.opts}
_CALL = re.compile(r"^(?:\S*/)?mill\s+(?P<words>[^#&|\\]+)")


def _shown(text: str) -> Iterator[str]:
    """What follows `mill` in the lines of a fence that a person types."""
    for line in text.split("\n"):
        typed = line.removeprefix("$ ").strip()
        for piece in re.split(r"&&|\|", typed):
            found = _CALL.match(piece.strip().removeprefix("sudo "))
            if found and found["words"].isascii():  # what is not is a drawing
                yield found["words"].strip()


def _calls() -> list[tuple[str, str]]:
    """(place, what follows `mill`) of every command in all pages."""
    found = [(str(fence), call) for fence in fences() for call in _shown(fence.text)]
    for path in PAGES:
        for paragraph in paragraphs(path):
            for code in inline(paragraph):
                call = _CALL.match(code.removeprefix("sudo "))
                if call and call["words"].split()[0] not in NOT_BUILT:
                    found.append((name(path), call["words"].strip()))
    return sorted(set(found))


def test_there_are_commands_to_check() -> None:
    assert len(_calls()) > 40


@pytest.mark.parametrize(("place", "call"), _calls())
def test_a_command_that_is_shown_exists_with_its_options(place: str, call: str) -> None:
    words = shlex.split(call)
    command: click.Command = cli
    options = set(_GLOBAL)
    context = click.Context(cli)
    while words:
        word = words.pop(0)
        if word.startswith("-") and word != "-":
            assert word.partition("=")[0] in options | {"--help", "--version"}, \
                f"{place}: mill {call}: no option {word}"
            continue
        if isinstance(command, click.Group):
            inner = command.get_command(context, word)
            if inner is None and command is not cli:
                continue  # the value of an option, such as of `mill dev --data DIR`
            assert inner is not None, f"{place}: mill {call}: no command {word}"
            command = inner
            options |= {flag for p in command.params for flag in p.opts}


@pytest.mark.parametrize("command", NOT_BUILT)
def test_what_is_not_built_is_absent_and_named_only_as_such(command: str) -> None:
    assert command not in COMMANDS, f"mill {command} is built: say so in the documents"
    for path in PAGES:
        for paragraph in paragraphs(path):
            if f"`mill {command}" in paragraph:
                assert "not built" in paragraph, f"{name(path)}: {paragraph}"


def test_every_command_is_in_some_document() -> None:
    shown = {call.split()[0] for _, call in _calls()}
    assert sorted(set(COMMANDS) - shown) == []


def test_the_error_that_the_language_shows_is_what_validate_prints(tmp_path: Path) -> None:
    (manifest,) = fences("hcl-invalid")
    (tmp_path / "bad.mill").write_text(manifest.text)
    (shown,) = re.findall(r"^\$ mill validate -f bad\.mill\n(.*?)^```", page("docs/language.md"),
                          re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-m", "reconciler.cli.main", "validate", "-f", "bad.mill"],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False)
    assert done.stderr.strip() == shown.strip()
    assert done.returncode == 2
