"""The global options, which stand before or after the command, and what they say."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

import click


@dataclass
class Settings:
    """What the global options said; "" and False where they were not given."""

    address: str = ""
    token: str = ""
    context: str = ""
    json: bool = False
    no_color: bool = False
    quiet: bool = False

    @property
    def color(self) -> bool:
        """Whether colours are wanted at all; off a terminal click takes them out by itself."""
        return not self.no_color and not os.environ.get("NO_COLOR")

    @property
    def live(self) -> bool:
        """Whether a person watches, so that lines may be drawn over."""
        return not self.json and not self.quiet and sys.stdout.isatty() \
            and os.environ.get("TERM", "") not in ("", "dumb")


pass_settings = click.make_pass_decorator(Settings, ensure=True)


def global_options(*, hidden: bool) -> list[click.Parameter]:
    """The global options as a command takes them; only `mill --help` shows them."""
    return [
        _option("--address", "the API of a node, such as http://127.0.0.1:4400; several with `,`",
                hidden, metavar="URL"),
        _option("--token", "what the API is asked with", hidden),
        _option("--context", "a cluster of ~/.config/mill/contexts.toml", hidden, metavar="NAME"),
        _option("--json", "one JSON document; for streams, one object a line", hidden, flag=True),
        _option("--no-color", "no colours on a terminal", hidden, flag=True),
        _option("-q/--quiet", "only what went wrong; of a list, only the names", hidden, flag=True),
    ]


class Command(click.Command):
    """A command that takes the global options too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += global_options(hidden=True)


class Group(click.Group):
    """A group whose commands take the global options, as it does itself."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += global_options(hidden=True)


def _option(
    names: str, help_: str, hidden: bool, *, flag: bool = False, metavar: str | None = None
) -> click.Option:
    return click.Option(names.split("/"), help=help_, hidden=hidden, is_flag=flag, default=None,
                        metavar=metavar, expose_value=False, callback=_keep)


def _keep(context: click.Context, parameter: click.Parameter, value: str | bool | None) -> None:
    """The last one said wins; one that was not said changes nothing."""
    if value is not None and parameter.name is not None:
        setattr(context.ensure_object(Settings), parameter.name, value)
