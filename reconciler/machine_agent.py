"""`mill agent`: the machine's own containerd, then its node, until it is stopped or removed."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import structlog

from reconciler.errors import Conflict, MillError
from reconciler.executor.containerd import network
from reconciler.executor.containerd.daemon import start_daemon
from reconciler.executor.containerd.network_command import ip
from reconciler.log import recover as log_recover
from reconciler.log import rejoin as log_rejoin
from reconciler.log.settings import Member
from reconciler.machine import Place, only_agent
from reconciler.node import SWITCH_S, log_failure, log_to, run_until_stopped
from reconciler.node_config import NodeConfig
from reconciler.node_remains import end_companions, end_containers
from reconciler.node_removal import is_removed

log = structlog.get_logger("mill.agent")


def run(place: Place, config: NodeConfig, *, recover: bool = False, rejoin: bool = False) -> int:
    """0 after a stop that was asked for, or a removal; 1 with the reason logged."""
    log_to(sys.stderr)
    # The raft thread must not wait 5 ms for the loop's thread to let go of the interpreter.
    sys.setswitchinterval(SWITCH_S)
    with only_agent(place):
        try:
            if is_removed(place.folder):
                raise Conflict(f"{config.name} was removed from {config.cluster}",
                               at=str(place.folder), hint="clean this machine: mill leave; it "
                               "can join again after that")
            if recover:
                _recover(config)
            if rejoin:
                moved = log_rejoin.begin(Path(config.data) / "log")
                log.warning("log_moved_aside", node=config.name, to=", ".join(moved))
            Path(config.run).mkdir(mode=0o700, parents=True, exist_ok=True)
            start_daemon(place.containerd)
            asyncio.run(_prepare_network(config))
        except (MillError, OSError) as error:
            log_failure(config, error)
            return 1
        code = run_until_stopped(config)
        if is_removed(place.folder):
            # Nobody counts on them any more, and what is a service's only one runs elsewhere.
            asyncio.run(_end_all(place, config))
        return code


async def _end_all(place: Place, config: NodeConfig) -> None:
    await end_companions(config)
    await end_containers(config, place.containerd)


async def _prepare_network(config: NodeConfig) -> None:
    # A namespace that stands for a machine begins with it down; a machine does not reach itself
    # then, not even at its other addresses.
    await ip(None, "link set lo up")
    await network.keep_host_namespace(Path(config.host_netns))


def _recover(config: NodeConfig) -> None:
    """Make this node the only voter of what its own log holds."""
    member = Member(config.name, config.me.host, config.me.log_port)
    last = log_recover.recover(Path(config.data) / "log", member)
    # Its agent may have obeyed a leader of a later term, which is lost with the others.
    (Path(config.data) / "agent.term").unlink(missing_ok=True)
    log.warning("recovered", node=config.name, index=last.index, term=last.term)
