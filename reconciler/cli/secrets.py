"""`mill secret`: values come from an argument or standard input and are never echoed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from reconciler.cli.output import document, lines
from reconciler.cli.session import ask
from reconciler.cli.settings import Group, Settings, pass_settings
from reconciler.errors import Malformed

if TYPE_CHECKING:
    from reconciler.api.client import Client
    from reconciler.api.types import Removed, SecretAnswer, SecretList, SecretSet

MAX_VALUE_BYTES = 2 * 1024 * 1024
"""The bound of a request."""


@click.group(cls=Group)
def secret() -> None:
    """Secrets, for ${secret(NAME)} in manifests."""


@secret.command("set")
@click.argument("name")
@click.argument("value", required=False)
@pass_settings
def set_(settings: Settings, name: str, value: str | None) -> None:
    """Set a secret; its value comes from standard input where VALUE is - or not there."""
    _check_name(name)
    given = _from_input(name) if value in (None, "-") else value
    assert given is not None

    async def work(client: Client) -> SecretSet:
        return await client.set_secret(name, given)

    answer = ask(settings, work)
    if settings.json:
        document(answer)
    elif not settings.quiet:
        click.echo(f"  {answer.name}: set (version {answer.version})")


@secret.command("get")
@click.argument("name")
@pass_settings
def get(settings: Settings, name: str) -> None:
    """A secret in clear."""
    async def work(client: Client) -> SecretAnswer:
        return await client.secret(name)

    answer = ask(settings, work)
    if settings.json:
        document(answer)
    else:
        click.echo(answer.value)


@secret.command("list")
@pass_settings
def list_(settings: Settings) -> None:
    """The names of all secrets."""
    async def work(client: Client) -> SecretList:
        return await client.secrets()

    answer = ask(settings, work)
    if settings.json:
        document(answer)
    else:
        lines([row.name for row in answer.secrets])


@secret.command("delete")
@click.argument("name")
@pass_settings
def delete(settings: Settings, name: str) -> None:
    """Forget a secret that nothing uses."""
    async def work(client: Client) -> Removed:
        return await client.delete_secret(name)

    answer = ask(settings, work)
    if settings.json:
        document(answer)
    elif not settings.quiet:
        click.echo(f"  {answer.name}: deleted")


def _check_name(name: str) -> None:
    """Before a value is asked for. The rule is the language's (rule 2)."""
    from reconciler.language.strings import SECRET_NAME

    if not SECRET_NAME.fullmatch(name):
        raise Malformed(f"{name[:60]!r} is not the name of a secret",
                        hint="letters, digits, '.', '_' and '-', at most 128, first a letter or "
                             "a digit")


def _from_input(name: str) -> str:
    """Standard input without one final newline; typed without being shown on a terminal."""
    if sys.stdin.isatty():
        typed = click.prompt(f"value of {name}", hide_input=True, err=True)
        assert isinstance(typed, str)
        return typed
    data = sys.stdin.buffer.read(MAX_VALUE_BYTES + 1)
    if len(data) > MAX_VALUE_BYTES:
        raise Malformed("the value is over 2 MiB", hint="a secret is text, not a file store")
    try:
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError:
        raise Malformed("the value is no UTF-8 text", hint="encode it first, such as by base64") \
            from None
