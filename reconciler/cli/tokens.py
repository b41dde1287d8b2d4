"""`mill token`: who may speak to the cluster, and which machines may join it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

import click

from reconciler.cli.output import age, document, lines, table
from reconciler.cli.problems import shown
from reconciler.cli.session import ask
from reconciler.cli.settings import Group, Settings, pass_settings

if TYPE_CHECKING:
    from reconciler.api.client import Client
    from reconciler.api.types import Removed, TokenList, TokenMade, TokenRow

HEADS = ("ID", "ROLE", "SERVICES", "CREATED", "USED", "EXPIRES")


@click.group(cls=Group)
def token() -> None:
    """Tokens: for people and programs, and for machines that join."""


@token.command("create")
@click.option("--role", type=click.Choice(["admin", "deploy", "read"]),
              help="deploy deploys, scales and restarts; read looks; admin does all")
@click.option("--service", "services", multiple=True, metavar="S",
              help="with --role deploy: only this one; may repeat")
@click.option("--join", is_flag=True, help="for machines: mill join ADDR --token TOKEN")
@click.option("--uses", type=click.IntRange(min=1), help="with --join: how many machines  "
              "[default: 1]")
@click.option("--expires", default="", metavar="1h",
              help="when it ends by itself; with --join in an hour by default, else never")
@pass_settings
def create(
    settings: Settings, role: str | None, services: tuple[str, ...], join: bool,
    uses: int | None, expires: str,
) -> None:
    """Make a token. Its text is shown this once, and kept nowhere."""
    from reconciler.api.types import TokenBody

    if join == (role is not None):
        raise click.UsageError("one of --role and --join says what the token is for")
    if join and services:
        raise click.UsageError("--service goes with --role deploy")
    if uses is not None and not join:
        raise click.UsageError("--uses goes with --join")
    body = TokenBody(role=cast(Literal["admin", "deploy", "read"] | None, role),
                     services=services, join=join, uses=uses, expires=expires)

    async def work(client: Client) -> TokenMade:
        return await client.create_token(body)

    made = ask(settings, work)
    if settings.json:
        document(made)
    elif settings.quiet:
        click.echo(made.token)
    else:
        lines(_made(made))


@token.command("list")
@pass_settings
def list_(settings: Settings) -> None:
    """All tokens, oldest first; what they are is known to their holders alone."""
    async def work(client: Client) -> TokenList:
        return await client.tokens()

    answer = ask(settings, work)
    if settings.json:
        document(answer)
    else:
        lines(table(HEADS, list(map(_row, answer.tokens)), quiet=settings.quiet))


@token.command("revoke")
@click.argument("token_id", metavar="ID")
@pass_settings
def revoke(settings: Settings, token_id: str) -> None:
    """A token is good no more, from now on and on every node."""
    async def work(client: Client) -> Removed:
        return await client.revoke_token(token_id)

    answer = ask(settings, work)
    if settings.json:
        document(answer)
    elif not settings.quiet:
        click.echo(f"  {shown(answer.name)}: revoked")


def _made(made: TokenMade) -> list[str]:
    """The text stands on a line of its own, to be copied whole."""
    until = f" until {made.expires_at}" if made.expires_at else ""
    if made.role != "join":
        bound = f" for {', '.join(made.services)}" if made.services else ""
        return [f"  {made.id}: role {made.role}{bound}{until}, shown this once", made.token]
    from reconciler.api.join_token import parse_join_token

    uses = made.uses if isinstance(made.uses, int) else 1
    machines = "one machine" if uses == 1 else f"{uses} machines"
    address = parse_join_token(made.token).address
    return [f"  {made.id}: lets {machines} in{until}, shown this once",
            f"mill join {shown(address)} --token {shown(made.token)}"]


def _row(row: TokenRow) -> tuple[str, ...]:
    return (
        row.id, row.role, ",".join(row.services) or "-", age(row.created_at),
        f"{row.used}/{row.uses}" if row.role == "join" else "-", row.expires_at or "-",
    )
