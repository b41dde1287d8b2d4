"""The program as it starts: help, imports, mistakes in the call."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

from reconciler.cli.main import COMMANDS
from tests.cli.conftest import Mill

HEAVY = ("grpc", "hcl2", "dulwich", "httpx", "starlette", "pyroute2", "asyncio", "rich")


def test_help_imports_nothing_heavy_and_no_command() -> None:
    code = (
        "import sys, json, contextlib, io\n"
        "from reconciler.cli.main import run\n"
        "with contextlib.redirect_stdout(io.StringIO()): run(['--help'])\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    loaded = set(json.loads(told.stdout))
    assert not loaded & set(HEAVY)
    assert {name for name in loaded if name.startswith("reconciler.cli.")} == {
        "reconciler.cli.main", "reconciler.cli.settings"}


def test_help_names_every_command(offline: Mill) -> None:
    result = offline("--help")
    assert result.code == 0
    named = {line.split()[0] for line in result.lines if line.startswith("  ") and line.split()}
    assert set(COMMANDS) <= named


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_helps(offline: Mill, name: str) -> None:
    module, attribute, _ = COMMANDS[name]
    assert getattr(importlib.import_module(f"reconciler.cli.{module}"), attribute).name == name
    result = offline(name, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"Usage: mill {name}")


def test_commands_not_built_yet_are_absent(offline: Mill) -> None:
    for name in ("spawn", "hotfix", "volume", "exec"):
        assert name not in offline("--help").out.split()
        result = offline(name)
        assert (result.code, result.err.startswith("error: no command")) == (2, True)


@pytest.mark.parametrize("arguments", [
    ("deploi",), ("deploy", "--nosuch"), ("logs",), ("scale", "web"), ("deploy", "-f", "nosuch"),
    ("deploy", "--var", "x"), ("secret", "set", "a/b", "v"), ("dev", "--nodes", "0"),
    ("logs", "web", "-f", "--previous"),
])
def test_wrong_call_is_exit_code_2_with_one_error(
    offline: Mill, arguments: tuple[str, ...]
) -> None:
    offline.write("mill.mill", 'service "web" { image = "x" }\n')
    result = offline(*arguments)
    assert (result.code, result.out) == (2, "")
    assert [line.split(":")[0] for line in result.err.splitlines()] == ["error", "hint"]


def test_near_name_is_suggested(offline: Mill) -> None:
    assert "did you mean deploy?" in offline("deploi").err


def test_call_without_a_command_shows_help(offline: Mill) -> None:
    result = offline()
    assert result.code == 2
    assert "Usage: mill" in result.out + result.err
