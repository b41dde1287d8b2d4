"""`mill`: the group of all commands, each imported when it is called, and how a call ends."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import click

from reconciler.cli.settings import Settings, global_options
from reconciler.errors import MillError

INTERRUPTED = 130

# Name: (module below reconciler.cli, its attribute, what `mill --help` says of it).
SECTIONS: dict[str, dict[str, tuple[str, str, str]]] = {
    "Manifests": {
        "validate": ("offline", "validate", "check manifests; needs no cluster"),
        "fmt": ("offline", "fmt", "lay manifests out in the one way"),
        "plan": ("deploy", "plan", "what a deploy would do"),
        "deploy": ("deploy", "deploy", "make the cluster what the manifests say"),
    },
    "Deploys": {
        "deploys": ("deploys", "deploys", "what was deployed, newest first"),
        "deploy-show": ("deploys", "deploy_show", "one deploy; -f follows it to its end"),
        "cancel": ("deploys", "cancel", "roll a running deploy back"),
        "rollback": ("deploy", "rollback", "deploy an earlier revision of a service"),
        "restart": ("deploy", "restart", "new containers for a service"),
        "scale": ("deploy", "scale", "another number of replicas"),
    },
    "Look": {
        "status": ("look", "status", "the cluster at a glance"),
        "services": ("look", "services", "what runs"),
        "nodes": ("look", "nodes", "the machines"),
        "ps": ("look", "ps", "every allocation"),
        "events": ("look", "events", "what happened"),
        "logs": ("logs", "logs", "what a service or an allocation wrote"),
    },
    "Machines": {
        "init": ("agent", "init", "found a cluster: this machine is its first node"),
        "join": ("agent", "join", "make this machine a node of a cluster"),
        "agent": ("agent", "agent", "run this machine's node"),
        "leave": ("agent", "leave", "take this machine out of its cluster, without a trace"),
    },
    "Cluster": {
        "drain": ("nodes", "drain", "move everything off a node"),
        "undrain": ("nodes", "undrain", "let a node take allocations again"),
        "remove": ("nodes", "remove", "forget a node that has no allocations left"),
        "token": ("tokens", "token", "who may ask, and which machines may join"),
        "git": ("sources", "git", "repositories that the cluster follows"),
        "secret": ("secrets", "secret", "secrets"),
        "backup": ("backup", "backup", "services, secrets and sources to one sealed file"),
        "restore": ("backup", "restore", "a backup back into an empty cluster"),
        "dev": ("dev", "dev", "a real cluster on this machine"),
    },
}
COMMANDS = {name: entry for section in SECTIONS.values() for name, entry in section.items()}


class Mill(click.Group):
    """All commands by name; what they are made of is imported when one is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the sections."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or None where there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        found = getattr(importlib.import_module(f"reconciler.cli.{module}"), attribute)
        assert isinstance(found, click.Command)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the name that may have been meant."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(name, COMMANDS, n=1)
            meant = f", did you mean {near[0]}?" if near else ""
            raise click.UsageError(f"no command {name!r}{meant}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The sections, without importing any of what they name."""
        for title, entries in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, entry[2]) for name, entry in entries.items()])


@click.group(cls=Mill, params=global_options(hidden=False),
             context_settings={"help_option_names": ["-h", "--help"]},
             options_metavar="[OPTIONS]", subcommand_metavar="COMMAND [ARGS]...")
@click.version_option(package_name="mill", prog_name="mill")
def cli() -> None:
    """Runs a team's containers on its own machines. Options may also follow the command."""


def run(arguments: Sequence[str]) -> int:
    """Carry out one call; its exit code (contracts: CLI)."""
    settings = Settings()
    try:
        code = cli.main(list(arguments), prog_name="mill", standalone_mode=False, obj=settings)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        from reconciler.cli.problems import show_usage

        return show_usage(error, settings)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except MillError as error:
        from reconciler.cli.problems import show

        return show(error, settings)
    return code if isinstance(code, int) else 0


def main() -> None:
    """The program."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
