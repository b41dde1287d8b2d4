"""`mill dev`: a real cluster on this machine, until Ctrl-C; and failures to try on it."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.cli import contexts
from reconciler.cli.problems import shown
from reconciler.cli.settings import Group, Settings, pass_settings
from reconciler.errors import Conflict, Malformed

if TYPE_CHECKING:
    from reconciler.dev import Dev, Options

DATA = ".mill-dev"
PORTS = {0: "API", 1: "log", 2: "agent", 3: "DNS", 4: "http", 5: "https"}
STEP = 10
MAX_NODES = 20
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)(?:([KMGT])(i?))?")

Say = Callable[[str], None]


@click.group(cls=Group, invoke_without_command=True)
@click.option("--nodes", type=click.IntRange(1, MAX_NODES), default=3, show_default=True)
@click.option("--repo", type=click.Path(path_type=Path), metavar="DIR",
              help="follow the checked-out branch of this repository")
@click.option("--data", type=click.Path(path_type=Path), default=Path(DATA), show_default=True,
              metavar="DIR", help="where the state is")
@click.option("--base-port", type=click.IntRange(1024, 65_000), default=4400, show_default=True)
@click.option("--cpu", type=click.FloatRange(0.01, 1024), metavar="N",
              help="cores of each node; the machine's own by default")
@click.option("--memory", metavar="SIZE", help="of each node, such as 4G; likewise")
@click.option("--dns-upstream", "upstreams", multiple=True, metavar="IP",
              help="who is asked for names outside .mill; as /etc/resolv.conf by default")
@click.option("--reset", is_flag=True, help="forget the cluster of --data: state and containers")
@pass_settings
@click.pass_context
def dev(
    context: click.Context, settings: Settings, nodes: int, repo: Path | None, data: Path,
    base_port: int, cpu: float | None, memory: str | None, upstreams: tuple[str, ...],
    reset: bool,
) -> int:
    """A real cluster on this machine: real log, real containers, real edge.

    Ctrl-C stops it and its containers; its state stays for the next start.
    """
    if context.invoked_subcommand is not None:
        return 0
    from reconciler.dev import Dev, Options, check_machine

    check_machine()
    options = Options(nodes=nodes, data=data, base_port=base_port,
                      cpu_milli=round((cpu or 0) * 1000), memory_bytes=_bytes(memory),
                      dns_upstreams=upstreams)
    say = _sayer(settings)
    if reset:
        return _reset(options, say)
    if repo is not None and not (repo / ".git").exists() and not (repo / "HEAD").is_file():
        raise Malformed(f"{repo} is no git repository", hint="make it one with: git init")
    if not Dev(options, say).run_folder.exists():
        # Where it does, a run was killed whose Envoy and DNS go on, and are taken up.
        _check_ports(options)
    return _run(options, repo.resolve() if repo else None, say)


@dev.command("kill")
@click.argument("node")
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help="of the cluster")
@click.pass_context
def kill(context: click.Context, node: str, data: Path | None) -> None:
    """A power cut for one node: process, edge, DNS, containers and link."""
    _command(context, "kill", node, data)


@dev.command("start")
@click.argument("node")
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help="of the cluster")
@click.pass_context
def start(context: click.Context, node: str, data: Path | None) -> None:
    """Switch a node on again."""
    _command(context, "start", node, data)


def _command(context: click.Context, verb: str, node: str, data: Path | None) -> None:
    from reconciler.dev import command

    assert context.parent is not None
    folder = data or context.parent.params["data"]
    command(folder, verb, node)
    click.echo(f"  {node} is {'off' if verb == 'kill' else 'on'}")


def _run(options: Options, repo: Path | None, say: Say) -> int:
    """Until a signal or an error; 0 where a signal asked for the end."""
    import asyncio

    _quiet_log()

    return asyncio.run(_serve(options, repo, say))


async def _serve(options: Options, repo: Path | None, say: Say) -> int:
    import asyncio
    import signal

    from reconciler.dev import Dev

    loop = asyncio.get_running_loop()
    work = asyncio.create_task(_cluster(Dev(options, say), repo, say))
    asked = False

    def stop() -> None:
        nonlocal asked
        if asked:
            say("still stopping...")
            return
        asked = True
        say("stopping the nodes and their containers...")
        work.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
    try:
        await work
    except asyncio.CancelledError:
        if not asked:
            raise
    say(f"stopped; the state is in {options.data}, and mill dev --reset forgets it")
    return 0


async def _cluster(dev: Dev, repo: Path | None, say: Say) -> None:
    import asyncio

    options = dev.options
    say(f"starting {options.nodes} node{'' if options.nodes == 1 else 's'} in {options.data}...")
    async with dev.up() as founding:
        addresses = tuple(dev.address(name) for name in dev.names)
        cluster = contexts.Cluster(addresses, founding.token)
        contexts.select(founding.cluster, cluster)
        for number, name in enumerate(dev.names):
            say(_addresses(name, options.base_port + STEP * number))
        say(f"ready  context {founding.cluster} (in {contexts.path()}); Ctrl-C stops it")
        if repo is None:
            await asyncio.Event().wait()
        else:
            from reconciler.cli.repository import follow

            await follow(cluster, str(repo), say)


def _addresses(name: str, base: int) -> str:
    return (f"  {name}  api http://127.0.0.1:{base}  ingress http://127.0.0.1:{base + 4} "
            f"https://127.0.0.1:{base + 5}  dns 127.0.0.1:{base + 3}")


def _reset(options: Options, say: Say) -> int:
    import asyncio

    from reconciler.dev import Dev

    if not options.data.exists():
        say(f"there is nothing in {options.data}")
        return 0
    _quiet_log()
    dev = Dev(options, say)
    asyncio.run(dev.reset())
    contexts.forget(f"dev-{dev.tag}")
    say(f"forgot the cluster in {options.data}")
    return 0


def _check_ports(options: Options) -> None:
    """A port that is taken, said before anything is made."""
    last = options.base_port + STEP * (options.nodes - 1) + max(PORTS)
    if last > 65_535:
        raise Malformed(f"--base-port {options.base_port} leaves no room for "
                        f"{options.nodes} nodes", hint="choose a lower one")
    for number in range(options.nodes):
        for offset, what in PORTS.items():
            port = options.base_port + STEP * number + offset
            kinds = [socket.SOCK_STREAM] + ([socket.SOCK_DGRAM] if what == "DNS" else [])
            if not all(_free(port, kind) for kind in kinds):
                raise Conflict(f"port {port} is in use: node-{number + 1} needs it for its {what}",
                               hint="choose others with --base-port")


def _free(port: int, kind: socket.SocketKind) -> bool:
    with socket.socket(socket.AF_INET, kind) as probe:
        if kind == socket.SOCK_STREAM:
            # Connections of an earlier run that still wait to end hold no listener up.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _bytes(size: str | None) -> int:
    if size is None:
        return 0
    found = _SIZE.fullmatch(size)
    if found is None:
        raise Malformed(f"--memory cannot be {size[:40]!r}", hint="write it as 512M or 4Gi")
    base = 1024 if found[3] else 1000
    power = "KMGT".index(found[2]) + 1 if found[2] else 0
    count = int(Decimal(found[1]) * base**power)
    if not count:
        raise Malformed("--memory cannot be 0", hint="leave it out for all that the machine has")
    return count


def _quiet_log() -> None:
    """What this process itself logs goes to standard error, and only where it is a warning."""
    import logging
    import sys

    import structlog

    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=lambda *_names: structlog.PrintLogger(sys.stderr),
    )


def _sayer(settings: Settings) -> Say:
    def say(text: str) -> None:
        if not settings.quiet or text.startswith("ready"):
            click.echo("\n".join(map(shown, text.split("\n"))))

    return say
