"""What every stage of a deploy works with: the log, the links, and how a deploy fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from reconciler.executor.agent.orders import AllocReport
from reconciler.executor.confirm import Confirm, believe
from reconciler.executor.ledger import CommandRefused, Ledger
from reconciler.executor.links import Links
from reconciler.fsm import commands as c
from reconciler.fsm.records import ENDED, Allocation, Change, Deploy, Failure
from reconciler.fsm.state import State
from reconciler.language.spec import ServiceSpec

log = structlog.get_logger("mill.deploy")


class DeployFailed(Exception):
    """The deploy cannot go on; carries what the terminal event will say."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


class NodeFault(Exception):
    """The node failed the allocation, not the version: another node may do better."""

    def __init__(self, alloc: Allocation, reason: str) -> None:
        super().__init__(reason)
        self.alloc = alloc


@dataclass(frozen=True)
class Stage:
    """One deploy's way to the log and the agents. `new_id` makes an allocation's id;
    `elsewhere` names another node for a replica (its spec, its digest) that this one failed;
    `confirm` is the leader's own look at what a node calls healthy."""

    ledger: Ledger
    links: Links
    deploy_id: str
    new_id: Callable[[str], str]
    elsewhere: Callable[[State, ServiceSpec, str, str], str | None]
    confirm: Confirm = believe

    @property
    def deploy(self) -> Deploy:
        """The deploy as the log has it now."""
        return self.ledger.state.deploys[self.deploy_id]

    @property
    def is_over(self) -> bool:
        """True once a cancel (or another hand) has ended the way forward."""
        return self.deploy.outcome != "running"

    async def say(self, command: c.AnyCommand) -> bool:
        """Propose; False where the state has moved past it, which the next look will show."""
        try:
            await self.ledger.propose(command)
        except CommandRefused as refused:
            log.info("command_refused", deploy=self.deploy_id, command=type(command).__name__,
                     reason=refused.what)
            return False
        return True

    def alloc(self, alloc_id: str) -> Allocation:
        """An allocation as the log has it now."""
        return self.ledger.state.allocations[alloc_id]

    def spec(self, change: Change) -> ServiceSpec:
        """The spec that a change brings."""
        return self.ledger.state.specs[change.spec_hash]

    def to_start(self) -> list[tuple[Change, int]]:
        """The slots that need a new container, in the order of the manifest's services."""
        return [
            (change, number)
            for change in self.deploy.changes
            if change.action in ("create", "update")
            for number, slot in enumerate(change.slots)
            if not slot.keep
        ]

    def alloc_of(self, service: str, slot: int) -> Allocation | None:
        """The newest attempt at a slot; an ended one only where none goes on."""
        tries = [
            a for a in self.ledger.state.of_deploy(self.deploy_id)
            if a.service == service and a.slot == slot
        ]
        return max(tries, key=lambda a: (a.status not in ENDED, a.attempt), default=None)


def how_it_ended(report: AllocReport) -> str:
    """`exited with code 3`, `was killed: out of memory`, `was killed by signal 9`."""
    if report.oom:
        return "was killed: out of memory"
    if report.exit_code is None:
        return "ended while its node's agent was away"
    code = report.exit_code
    if code > 128:
        return f"was killed by signal {code - 128}"
    return f"exited with code {code}"
