"""`mill init`, `join`, `agent`, `leave`: this machine becomes a node, is one, is one no more."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from reconciler.cli import contexts
from reconciler.cli.output import document
from reconciler.cli.problems import shown
from reconciler.cli.settings import Command, Settings, pass_settings
from reconciler.errors import Conflict, Malformed

if TYPE_CHECKING:
    from reconciler.machine import Place
    from reconciler.node_config import NodeConfig

DATA = "/var/lib/mill"
T = TypeVar("T")

_data = click.option("--data", type=click.Path(path_type=Path), default=DATA, show_default=True,
                     metavar="DIR", help="where this node keeps its state")
_advertise = click.option("--advertise", default="", metavar="IP",
                          help="where the other nodes reach this one; by default the address of "
                               "the default route")
_name = click.option("--name", default="", metavar="NAME",
                     help="the node's name; by default the host's")


@click.command(cls=Command)
@_data
@_advertise
@_name
@pass_settings
def init(settings: Settings, data: Path, advertise: str, name: str) -> None:
    """Found a cluster: this machine is its first node, once its agent runs."""
    from reconciler import machine

    machine.check_machine()
    place = machine.Place(data)
    place.must_be_empty()
    founded = machine.found(
        place, _named(name), machine.advertised(advertise),
        lambda it: contexts.select(it.cluster, contexts.Cluster(
            (it.address,), it.token, ca=it.ca_pem.decode())))
    if settings.json:
        document({"cluster": founded.cluster, "node": founded.node, "address": founded.address,
                  "token": founded.token})
        return
    _say(settings,
         f"  founded {founded.cluster} with this machine as {founded.node}",
         f"  context {founded.cluster} written to {contexts.path()}",
         f"  next: {_agent(data)}   (or the systemd unit of docs/mill.service)",
         "        mill token create --join     for each further machine, once the agent runs")


@click.command(cls=Command)
@click.argument("at", metavar="ADDR")
@_data
@_advertise
@_name
@pass_settings
def join(settings: Settings, at: str, data: Path, advertise: str, name: str) -> None:
    """Join the cluster of the node at ADDR, with --token of mill token create --join."""
    from reconciler import machine, machine_joining

    machine.check_machine()
    if not settings.token:
        raise Malformed("a machine joins with a token",
                        hint="make one on a node with: mill token create --join; "
                             "then: mill join ADDR --token TOKEN")
    place = machine.Place(data)
    place.must_be_empty()
    joined = _run(machine_joining.join(
        place, at, settings.token, _named(name), machine.advertised(advertise),
        lambda text: _say(settings, f"  {text}"),
        lambda it: contexts.select(it.cluster, contexts.Cluster(
            it.addresses, it.token, ca=it.ca_pem.decode()))))
    if settings.json:
        document({"cluster": joined.cluster, "node": joined.node, "number": joined.number,
                  "address": joined.addresses[0]})
        return
    _say(settings,
         f"  joined {joined.cluster} as {joined.node}",
         f"  context {joined.cluster} written to {contexts.path()}",
         f"  next: {_agent(data)}   (or the systemd unit of docs/mill.service)")


@click.command(cls=Command)
@_data
@click.option("--recover", is_flag=True,
              help="the majority is lost for good: go on with this node alone")
@click.option("--rejoin", is_flag=True,
              help="this node's log is lost or damaged: bring it back from the others")
@pass_settings
def agent(settings: Settings, data: Path, recover: bool, rejoin: bool) -> int:
    """Run this machine's node, until SIGTERM. Containers go on without it."""
    from reconciler import machine

    machine.check_machine()
    if recover and rejoin:
        raise Malformed("--recover and --rejoin exclude each other",
                        hint="--rejoin while a majority lives, --recover where it is gone")
    place = machine.Place(data)
    config = place.config()
    _leave_private_mounts()
    if recover:
        _confirm_recovery(place, config)
    from reconciler import machine_agent

    return machine_agent.run(place, config, recover=recover, rejoin=rejoin)


@click.command(cls=Command)
@_data
@click.option("--timeout", default="10m", show_default=True,
              help="how long its allocations may take to move away")
@click.option("--force", is_flag=True,
              help="only clean this machine: its cluster is gone, or has removed it")
@click.option("--yes", is_flag=True, help="ask nothing")
@pass_settings
def leave(settings: Settings, data: Path, timeout: str, force: bool, yes: bool) -> int:
    """Take this machine out of its cluster, and remove all that mill made on it."""
    from reconciler import machine, machine_leaving

    machine.check_machine()
    place = machine.Place(data)
    config = place.config()
    _leave_private_mounts()
    told: Callable[[str], None] = lambda text: _say(settings, f"  {text}")  # noqa: E731  short

    def confirm(what: str) -> None:
        if not yes:
            _typed(what, config.name)

    _warnings_only()
    _run(machine_leaving.leave(place, config, timeout, force, told, confirm))
    # Whoever administers several machines from here goes on with the rest.
    kept = contexts.forget_node(config.cluster, f"https://{config.me.api}")
    _say(settings, f"  {config.name} has left; nothing of mill is on this machine any more",
         *([f"  but for the context {config.cluster} in {contexts.path()}, which asks its other "
            "nodes"] if kept else []))
    return 0


def _warnings_only() -> None:
    """What a command does is said by itself; what its parts log is not for its output."""
    import logging

    import structlog

    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr))


def _confirm_recovery(place: Place, config: NodeConfig) -> None:
    """Only what is lost is recovered: not beside an agent that runs, or a majority that lives."""
    from reconciler.machine_recovery import last_held, refuse_while_it_lives

    _run(refuse_while_it_lives(place, config))
    _typed(
        f"{last_held(config)}.\nOf several nodes that are left, recover the one with the greatest "
        "term, then the greatest index.\n"
        f"This makes {config.name} the only voter of {config.cluster}. What the lost nodes had "
        "acknowledged\nand this one never received is gone. The other nodes must never run again "
        "on their old data:\non each of them mill leave --force, then mill join.", config.name)


def _typed(what: str, name: str) -> None:
    """Go on only after the node's name was typed."""
    click.echo(what, err=True)
    click.echo(f"Type {name} to go on: ", err=True, nl=False)
    typed = sys.stdin.readline().strip()
    if typed != name:
        raise Conflict("not confirmed: nothing was changed", hint=f"type the node's name, {name}")


def _leave_private_mounts() -> None:
    """Go on in the mount namespace of whoever called where this one has no cgroups.

    `ip netns exec` makes such a one, with a fresh /sys; what is mounted there would also be out of
    reach of the next agent.
    """
    caller = _with_cgroups(os.getpid())
    if caller in (os.getpid(), 0) or os.environ.get("MILL_MOUNTS"):
        return
    os.environ["MILL_MOUNTS"] = "entered"
    root = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    os.execvp("nsenter", [  # noqa: S606  this very command again
        "nsenter", f"--mount=/proc/{caller}/ns/mnt", f"--wdns={Path.cwd()}", "--",
        sys.executable, *sys.orig_argv[1:],
    ])


def _with_cgroups(pid: int) -> int:
    """The nearest of a process and its ancestors that sees a mounted cgroup; 0 for none."""
    import re

    while pid > 0:
        try:
            mounts = Path(f"/proc/{pid}/mountinfo").read_text()
            parent = re.search(r"^PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)
        except OSError:
            return 0
        if " - cgroup" in mounts:
            return pid
        pid = int(parent[1]) if parent else 0
    return 0


def _named(name: str) -> str:
    import re
    import socket

    found = name or socket.gethostname().partition(".")[0].lower()
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", found):
        raise Malformed(f"a node cannot be named {found[:80]!r}",
                        hint="--name: a to z, 0 to 9 and -, at most 63 characters")
    return found


def _agent(data: Path) -> str:
    return "mill agent" if str(data) == DATA else f"mill agent --data {data}"


def _run(work: Coroutine[Any, Any, T]) -> T:
    import asyncio

    return asyncio.run(work)


def _say(settings: Settings, *lines: str) -> None:
    if not settings.quiet and not settings.json:
        click.echo("\n".join(map(shown, lines)))
