"""Mill with one promise broken on purpose: the simulation of the whole has to notice each.

`python -m tests.sim.whole.mutants --seeds 0..60` says after how many seeds it did.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from msgspec.structs import replace as with_fields

from reconciler.edge import table
from reconciler.errors import Conflict
from reconciler.executor import admit, membership
from reconciler.executor import drain as drain_module
from reconciler.executor.agent import terms
from reconciler.executor.agent.orders import AllocReport, Inventory, Report, Start
from reconciler.executor.agent.server import AgentServer
from reconciler.executor.agent.supervise import Actor, Found, Supervisor
from reconciler.executor.agent.terms import Terms
from reconciler.executor.bring_up import BringUp
from reconciler.executor.drain import Drain
from reconciler.executor.heal import Heal
from reconciler.executor.links import Link
from reconciler.executor.retire import Retire
from reconciler.fsm import apply as fsm_apply
from reconciler.fsm import apply_allocations, apply_deploys
from reconciler.fsm import commands as c
from reconciler.fsm.records import ENDED, Allocation, Change, Deploy
from reconciler.fsm.state import State
from reconciler.fsm.step import Refused
from tests.sim.whole import run as simulation
from tests.sim.whole.replica import SimReplica

Replace = Callable[[object, str, Callable[..., object]], None]
Mutant = Callable[[Replace], None]


def obey_any_term(replace: Replace) -> None:
    """Agents do not look at the term of who orders."""
    session = AgentServer._session

    def open_to_all(agent: AgentServer, orders: Any, context: Any) -> AsyncIterator[Report]:
        agent._term, agent._floor = 0, lambda: 0
        return session(agent, orders, context)

    replace(AgentServer, "_session", open_to_all)


def commit_without_health(replace: Replace) -> None:
    """Neither the leader nor the state waits for what is new to be healthy."""

    async def hope(_self: BringUp) -> None:
        return

    def any_state(state: State, deploy: Deploy, change: Change) -> dict[int, Allocation] | Refused:
        new = {a.slot: a for a in state.of_deploy(deploy.id)
               if a.service == change.service and a.status not in ENDED}
        return {number: state.allocations[slot.keep] if slot.keep else new[number]
                for number, slot in enumerate(change.slots)
                if change.action in ("create", "update") and (slot.keep or number in new)}

    replace(BringUp, "run", hope)
    replace(apply_deploys, "_filled", any_state)


def commit_by_halves(replace: Replace) -> None:
    """The last service of a deploy keeps its old revision."""
    flip = apply_deploys._flip

    def all_but_one(state: State, deploy: Deploy, change: Change, slots: Any) -> State:
        last = deploy.changes[-1].service
        return state if len(deploy.changes) > 1 and change.service == last \
            else flip(state, deploy, change, slots)

    replace(apply_deploys, "_flip", all_but_one)


def forget_one_service(replace: Replace) -> None:
    """A rollback leaves the first of its services running."""
    roll_back = apply_deploys.roll_back_deploy

    def most(state: State, command: c.RollBackDeploy) -> State | Refused:
        after = roll_back(state, command)
        if isinstance(after, Refused):
            return after
        first = after.deploys[command.deploy].changes[0].service
        kept = {a.id: state.allocations[a.id] for a in after.of_service(first)}
        return with_fields(after, allocations={**after.allocations, **kept})

    replace(fsm_apply, "roll_back_deploy", most)


def heal_ignores_live(replace: Replace) -> None:
    """Healing takes care of what a deploy is still bringing up, too."""

    async def look(heal: Heal) -> None:
        await heal._nodes()
        for alloc in list(heal.ledger.state.allocations.values()):
            if alloc.status not in ENDED:
                with contextlib.suppress(Conflict):
                    await heal._alloc(with_fields(alloc, live=True))
        await heal._vacant()

    replace(Heal, "_look", look)


def route_the_unproven(replace: Replace) -> None:
    """An edge sends traffic to what is live and runs, healthy or not."""
    endpoint = table._endpoint

    def eager(state: State, alloc: Allocation) -> table.Endpoint | None:
        if alloc.status in ("starting", "running"):
            alloc = with_fields(alloc, status="healthy")
        return endpoint(state, alloc)

    replace(table, "_endpoint", eager)


def start_again(replace: Replace) -> None:
    """An order that is repeated starts the container anew."""

    def want(actor: Actor, order: Start | None) -> None:
        actor.order, actor.running, actor.ended = order, -1, -1
        actor._changed.set()

    replace(Actor, "want", want)


def adopt_nothing(replace: Replace) -> None:
    """An agent that starts stops what it finds."""
    adopt = Supervisor._adopt

    def stranger(supervisor: Supervisor, alloc: str, _order: object, found: Found) -> None:
        adopt(supervisor, alloc, None, found)

    replace(Supervisor, "_adopt", stranger)


def never_sweep(replace: Replace) -> None:
    """Containers that nobody wants any more stay."""
    replace(Retire, "_sweep", lambda retire, link: None)


def sweep_what_is_new(replace: Replace) -> None:
    """What is not live is swept, also what a deploy is bringing up."""
    sweep = Retire._sweep

    def all_but_live(retire: Retire, link: Link) -> None:
        sweep(retire, link)
        for alloc in link.allocs:
            known = retire.ledger.state.allocations.get(alloc)
            if known is None or not known.live:
                retire._order(alloc, link)

    replace(Retire, "_sweep", all_but_live)


def believe_old_reports(replace: Replace) -> None:
    """An inventory adds to what a link knew, and takes nothing away."""
    hear = Link.hear

    def keep(link: Link, report: Report) -> str | None:
        before = dict(link.allocs) if isinstance(report, Inventory) else {}
        whose = hear(link, report)
        link.allocs = {**before, **link.allocs}
        return whose

    replace(Link, "hear", keep)


def ask_twice_get_two(replace: Replace) -> None:
    """The Idempotency-Key is forgotten."""
    start = apply_deploys.start_deploy

    def keyless(state: State, command: c.StartDeploy) -> State | Refused:
        without_key = {n: with_fields(d, key="") for n, d in state.deploys.items()}
        after = start(with_fields(state, deploys=without_key), command)
        if isinstance(after, Refused):
            return after
        keys = {n: with_fields(d, key=state.deploys[n].key) if n in state.deploys else d
                for n, d in after.deploys.items()}
        return with_fields(after, deploys=keys)

    def known(state: State, _key: str) -> None:
        running = state.running_deploy()
        if running is not None:
            raise admit.DeployRunning(running.id)

    replace(fsm_apply, "start_deploy", keyless)
    replace(admit, "_known", known)


def commit_after_cancel(replace: Replace) -> None:
    """A deploy that is being rolled back may be committed all the same."""

    def whatever(state: State, deploy_id: str) -> Deploy | Refused:
        deploy = state.deploys.get(deploy_id)
        return deploy if deploy is not None else Refused(f"no deploy {deploy_id}")

    replace(apply_deploys, "_running", whatever)


def report_health_unseen(replace: Replace) -> None:
    """An agent calls healthy whatever runs."""
    say = Actor._say

    def well(actor: Actor, report: AllocReport) -> None:
        say(actor, with_fields(report, healthy=True) if report.phase == "running" else report)

    replace(Actor, "_say", well)


def forget_terms(replace: Replace) -> None:
    """Agents begin each life without a term."""
    replace(Terms, "newest", lambda terms: 0)


def keep_terms_unsynced(replace: Replace) -> None:
    """What an agent keeps of its terms is there after a power cut, or is not."""
    replace(terms, "_sync", lambda folder: None)


def drain_before_it_serves(replace: Replace) -> None:
    """Neither the drain nor the state waits until the replacement is healthy."""
    retire = apply_allocations.retire_alloc

    def blind(state: State, command: c.RetireAlloc) -> State | Refused:
        stays = state.allocations.get(command.successor)
        if stays is None:
            return retire(state, command)
        well = with_fields(stays, status="healthy")
        after = retire(with_fields(state, allocations={**state.allocations, stays.id: well}),
                       command)
        return after if isinstance(after, Refused) else with_fields(
            after, allocations={**after.allocations, stays.id: stays})

    replace(fsm_apply, "retire_alloc", blind)
    replace(Drain, "_over", lambda drain, state, pair: True)


def drain_without_the_edges(replace: Replace) -> None:
    """A drain retires as soon as the replacement is healthy, whether the edges know or not."""
    replace(Drain, "_over", lambda drain, state, pair: pair.stays.status == "healthy")


def drain_in_words_alone(replace: Replace) -> None:
    """Nothing is ever moved off a draining node."""
    replace(drain_module, "stranded", lambda state: [])


def never_promote(replace: Replace) -> None:
    """Who joins only follows, for ever."""
    replace(membership, "wanted_voters", lambda nodes: 1)


def lead_on_while_draining(replace: Replace) -> None:
    """A leader that is to vote no more keeps its leadership."""

    async def no(_drain: object, _state: object, _leaving: object) -> bool:
        return False

    async def stays(_replica: object, to: str | None = None) -> None:
        raise Conflict(f"{to} cannot lead")

    replace(Drain, "_hand_over", no)
    replace(SimReplica, "transfer", stays)


def remove_in_the_state_alone(replace: Replace) -> None:
    """Who was removed stays a member of the log."""
    replace(membership, "_learners", lambda view: None)


def answer_who_was_cancelled(replace: Replace) -> None:
    """A proposer that is cancelled as its answer comes gets the answer instead, as `wait_for` has
    it before Python 3.12: loops of a leader that was deposed go on."""
    propose = SimReplica.propose

    async def waited(replica: SimReplica, command: bytes, timeout_s: float = 10.0) -> object:
        asking = asyncio.ensure_future(propose(replica, command, timeout_s))
        return await asyncio.wait_for(asking, timeout_s + 1.0)

    replace(SimReplica, "propose", waited)


MUTANTS: tuple[Mutant, ...] = (
    obey_any_term,
    commit_without_health,
    commit_by_halves,
    forget_one_service,
    heal_ignores_live,
    route_the_unproven,
    start_again,
    adopt_nothing,
    never_sweep,
    sweep_what_is_new,
    believe_old_reports,
    ask_twice_get_two,
    commit_after_cancel,
    report_health_unseen,
    answer_who_was_cancelled,
    forget_terms,
    keep_terms_unsynced,
    drain_before_it_serves,
    drain_without_the_edges,
    drain_in_words_alone,
    never_promote,
    lead_on_while_draining,
    remove_in_the_state_alone,
)


@contextlib.contextmanager
def broken(mutant: Mutant) -> Iterator[None]:
    """Run with one promise broken; everything is put back afterwards."""
    with contextlib.ExitStack() as undo:

        def replace(owner: object, name: str, what: Callable[..., object]) -> None:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, what)

        mutant(replace)
        yield


def caught_at(mutant: Mutant, seeds: range) -> tuple[int, Exception] | None:
    """The first seed that fails with the mutant, and how."""
    with broken(mutant):
        for seed in seeds:
            try:
                simulation.run(seed)
            except Exception as error:  # noqa: BLE001  # whatever it is, it was noticed
                return seed, error
    return None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0..60")
    parser.add_argument("--only", default="")
    options = parser.parse_args(arguments)
    first, _, end = options.seeds.partition("..")
    logging.disable(logging.CRITICAL)
    missed = 0
    for mutant in MUTANTS:
        if options.only not in mutant.__name__:
            continue
        caught = caught_at(mutant, range(int(first), int(end)))
        missed += caught is None
        how = "NOT CAUGHT" if caught is None else f"seed {caught[0]}: {caught[1]}"
        print(f"{mutant.__name__}: {how}"[:200], flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
