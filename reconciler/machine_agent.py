"""`mill agent`: the machine's own containerd, then its node, until it is stopped or removed."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import structlog

from reconciler.errors import MillError
from reconciler.executor.containerd import network
from reconciler.executor.containerd.daemon import start_daemon
from reconciler.log import recover as log_recover
from reconciler.log import rejoin as log_rejoin
from reconciler.log.settings import Member
from reconciler.machine import Place, only_agent
from reconciler.node import SWITCH_S, log_failure, log_to, run_until_stopped
from reconciler.node_config import NodeConfig

log = structlog.get_logger("mill.agent")


def run(place: Place, config: NodeConfig, *, recover: bool = False, rejoin: bool = False) -> int:
    """0 after a stop that was asked for, or a removal; 1 with the reason logged."""
    log_to(sys.stderr)
    # The raft thread must not wait 5 ms for the loop's thread to let go of the interpreter.
    sys.setswitchinterval(SWITCH_S)
    with only_agent(place):
        try:
            if recover:
                _recover(config)
            if rejoin:
                moved = log_rejoin.begin(Path(config.data) / "log")
                log.warning("log_moved_aside", node=config.name, to=", ".join(moved))
            Path(config.run).mkdir(mode=0o700, parents=True, exist_ok=True)
            start_daemon(place.containerd)
            asyncio.run(network.keep_host_namespace(Path(config.host_netns)))
        except (MillError, OSError) as error:
            log_failure(config, error)
            return 1
        return run_until_stopped(config)


def _recover(config: NodeConfig) -> None:
    """Make this node the only voter of what its own log holds."""
    member = Member(config.name, config.me.host, config.me.log_port)
    last = log_recover.recover(Path(config.data) / "log", member)
    log.warning("recovered", node=config.name, index=last.index, term=last.term)
