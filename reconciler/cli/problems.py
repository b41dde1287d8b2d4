"""Errors as a person reads them, on standard error: what, where, what to do; and the exit code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import click

from reconciler.cli.settings import Settings
from reconciler.errors import MillError, Unprocessable
from reconciler.language.problems import (
    MAX_PROBLEMS,
    InvalidManifest,
    Problem,
    printable,
    render_all,
)

INVALID = 2


class Rejected(Unprocessable):
    """Manifests with problems, and their texts for the caret lines."""

    def __init__(
        self, problems: tuple[Problem, ...], texts: Mapping[str, str], omitted: int = 0
    ) -> None:
        super().__init__(f"{len(problems) + omitted} problems")
        self.problems = problems
        self.texts = dict(texts)
        self.omitted = omitted


def show(error: MillError, settings: Settings) -> int:
    """Print an error; its exit code."""
    match error:
        case Rejected():
            _print(render_all(error.problems, error.omitted, error.texts), settings)
            return INVALID
        case InvalidManifest():
            _print(render_all(error.problems, error.omitted, {}), settings)
            return INVALID
        case _:
            from reconciler.api.client import exit_code

            lines = [f"error: {shown(error.what)}"]
            lines += [f"  at {printable(error.at)}"] if error.at else []
            lines += [f"hint: {shown(error.hint)}"] if error.hint else []
            _print("\n".join(lines), settings)
            return exit_code(error)


def show_usage(error: click.ClickException, settings: Settings) -> int:
    """Print what is wrong with the call itself; its exit code."""
    message = error.format_message().rstrip(".")
    hint = ""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        hint = f"\nhint: {error.ctx.command_path} --help"
    _print(f"error: {shown(message[:1].lower() + message[1:])}{hint}", settings)
    return error.exit_code


def warn(text: str, settings: Settings) -> None:
    """A warning that is no part of the answer."""
    _print(f"warning: {shown(text)}", settings)


@contextlib.contextmanager
def about(texts: Mapping[str, str]) -> Iterator[None]:
    """What a cluster finds wrong with these texts is shown with their lines."""
    from reconciler.api.client import Refused

    try:
        yield
    except Refused as error:
        if not isinstance(error.problem.errors, tuple) or not error.problem.errors:
            raise
        problems = tuple(
            Problem(e.file, e.line, e.column, e.message, e.hint) for e in error.problem.errors
        )
        if len(problems) >= MAX_PROBLEMS:
            click.echo(f"the first {MAX_PROBLEMS} problems:", err=True)
        raise Rejected(problems, texts) from error


def shown(text: str) -> str:
    """Text of others for one line: no control character of it reaches the output."""
    return printable(text.expandtabs())


def _print(text: str, settings: Settings) -> None:
    for line in text.split("\n"):
        head, colon, rest = line.partition(": ")
        colour = {"error": "red", "hint": "cyan", "warning": "yellow"}.get(head)
        if colon and colour and settings.color:
            line = click.style(head + ":", fg=colour, bold=True) + " " + rest  # noqa: PLW2901  the line in colour
        click.echo(line, err=True)
