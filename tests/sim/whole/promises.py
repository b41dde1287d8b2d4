"""What mill promises, looked at whenever a state, an order or a container is new."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, NoReturn

from reconciler.edge.table import EdgeTable, edge_table
from reconciler.executor.agent.orders import Start
from reconciler.fsm.codec import encode_state
from reconciler.fsm.events import Event, Note
from reconciler.fsm.records import ENDED, Allocation, Deploy
from reconciler.fsm.state import State
from tests.sim.invariants import Invariants, Violation

if TYPE_CHECKING:
    from tests.sim.whole.containers import Container
    from tests.sim.whole.world import WholeNode, WholeWorld


RECOVERY_S = 30.0
"""A harm this long before a deploy may still show during it: 15 s to be down, and a restart."""


class LogPromises(Invariants):
    """Raft's; a command may be in as many places as it was proposed."""

    def __init__(self) -> None:
        super().__init__()
        self._offered: Counter[bytes] = Counter()
        self._stands_at: dict[bytes, set[int]] = {}

    def proposed(self, command: bytes) -> None:
        """Somebody hands it to a log."""
        self._offered[command] += 1

    def applied(self, name: str, index: int, command: bytes) -> None:
        if self._history.setdefault(index, command) != command:
            raise Violation(f"{name} diverges at {index}")
        places = self._stands_at.setdefault(command, set())
        places.add(index)
        if len(places) > self._offered[command]:
            raise Violation(f"{name} applies {command!r} at {sorted(places)}: more than proposed")


class Promises:
    """Mill's. `newest` is the state at the highest index that any node has applied."""

    def __init__(self, world: WholeWorld) -> None:
        self._world = world
        self.newest = State()
        self._hashes: dict[int, bytes] = {}
        self._healthy: set[tuple[str, int]] = set()
        self._term_of: dict[str, int] = {}  # node -> the newest term that its agent obeyed
        self._removed: dict[str, int] = {}  # node -> the index at which it was
        self._last_event = 0
        self._ended: dict[str, int] = {}  # deploy -> where its terminal event stands
        self._begun: dict[str, tuple[float, dict[str, tuple[str, int]]]] = {}
        self.starts: Counter[str] = Counter()
        self.hits: dict[str, float] = {}  # node -> when the world last did it harm
        self.outcomes: Counter[str] = Counter()
        self.moves = 0

    # -- states ----------------------------------------------------------------------------

    def applied(self, name: str, before: State, after: State) -> None:
        """A node has applied an entry: a state that nobody had, or one that all have alike."""
        digest = hashlib.blake2b(encode_state(after), digest_size=16).digest()
        if self._hashes.setdefault(after.index, digest) != digest:
            raise Violation(f"{name}'s state at {after.index} is not that of the others")
        if after.index > self.newest.index:
            self.newest = after
            self._one_set_at_a_time(before, after)
            self._routed(after)
            self._told(before, after)
            self._moved(before, after)
            for gone in before.nodes.keys() - after.nodes.keys():
                self._removed[gone] = after.index

    def loaded(self, name: str, state: State) -> None:
        """A snapshot is a state that was applied."""
        digest = hashlib.blake2b(encode_state(state), digest_size=16).digest()
        if self._hashes.get(state.index) != digest:
            raise Violation(f"{name} loads a state at {state.index} that nobody had")

    def _one_set_at_a_time(self, before: State, after: State) -> None:
        """Revisions change by a commit alone, and then all that its deploy changes."""
        committed = [d for d in after.deploys.values()
                     if d.committed and not _was(before, d.id, "committed")]
        expected = {name: s.live for name, s in before.services.items() if s.live}
        for deploy in committed:
            if deploy.outcome != "running":
                raise Violation(f"{deploy.id} is committed while it is {deploy.outcome}")
            for change in deploy.changes:
                if change.action == "remove":
                    expected.pop(change.service, None)
                elif change.action != "unchanged":
                    expected[change.service] = change.to_revision
                    self._complete(after, deploy, change.service, len(change.slots))
        live = {name: s.live for name, s in after.services.items() if s.live}
        if live != expected:
            raise Violation(f"at {after.index} the live revisions are {live}, not {expected}: "
                            f"{[d.id for d in committed] or 'nothing'} was committed")
        for alloc in after.allocations.values():
            if alloc.live and alloc.service not in live:
                raise Violation(f"{alloc.id} is live at {after.index}, its service is not")

    def _complete(self, state: State, deploy: Deploy, service: str, replicas: int) -> None:
        there = [a for a in state.of_service(service) if a.live]
        if sorted(a.slot for a in there) != list(range(replicas)):
            raise Violation(f"{deploy.id} commits {service} with slots "
                            f"{[a.slot for a in there]} of {replicas}")
        for alloc in there:
            if alloc.deploy == deploy.id and not (
                    alloc.status == "healthy" and (alloc.id, alloc.restarts) in self._healthy):
                raise Violation(f"{deploy.id} commits {alloc.id}, which was never healthy")

    def _routed(self, state: State) -> None:
        by_address: dict[tuple[str, int | None], Allocation] = {}
        for alloc in state.allocations.values():
            if alloc.status not in ENDED:
                other = by_address.setdefault((alloc.address, alloc.port), alloc)
                if other is not alloc:
                    raise Violation(f"{alloc.id} and {other.id} share {alloc.address}")
        for service, ip, port in endpoints(edge_table(state)):
            alloc = by_address[ip, port]
            first = not state.services[service].live
            if not (alloc.live or first) or alloc.service != service:
                raise Violation(f"{service} is routed to {alloc.id}, which is not live")
            if (alloc.id, alloc.restarts) not in self._healthy:
                raise Violation(f"{service} is routed to {alloc.id}, which was never healthy")

    def _told(self, before: State, after: State) -> None:
        """Events have the index of their entry and go up; a deploy ends once."""
        for event in _new_events(before, after):
            if event.index != after.index or event.index <= self._last_event:
                raise Violation(f"event {event.index} at {after.index}, after {self._last_event}")
            self._last_event = event.index
        for name, deploy in after.deploys.items():
            if name not in self._begun:
                self._begun[name] = (self._world.now_s, self._standing(after, deploy))
            if deploy.finished and name not in self._ended:
                self._ended[name] = after.index
                self.outcomes[deploy.outcome] += 1
                self._untouched(after, deploy)
            stream = after.deploy_events.get(name, ())
            terminal = [e.index for e in stream if e.kind != "progress"]
            if terminal != ([self._ended[name]] if deploy.finished else []):
                raise Violation(f"{name} is {deploy.outcome} with ends at {terminal}")
        if sum(not d.finished for d in after.deploys.values()) > 1:
            raise Violation(f"two deploys run at {after.index}")

    def _moved(self, before: State, after: State) -> None:
        """A drain takes nothing away before what takes its place is there, and known to be."""
        for event in _new_events(before, after):
            note = event.data
            if not isinstance(note, Note) or note.kind != "moved":
                continue
            goes = before.allocations[note.subject]
            if goes.status != "healthy":
                continue
            stay = [a for a in after.allocations.values()
                    if (a.service, a.slot, a.live) == (goes.service, goes.slot, True)
                    and (a.id, a.restarts) in self._healthy and a.status == "healthy"]
            if not stay:
                raise Violation(f"{goes.id} moves at {after.index}, and nothing takes its place")
            self.moves += 1
            self._known_at_edges(goes, stay[0])

    def _known_at_edges(self, goes: Allocation, stays: Allocation) -> None:
        if stays.port is None:
            return
        for node in self._world.present:
            if self._world.now_s - self.hits.get(node.name, 0.0) < RECOVERY_S:
                continue
            if stays.address not in {ip for _, ip, _ in endpoints(node.edge)}:
                raise Violation(f"{goes.id} moves, and the edge of {node.name} does not know of "
                                f"{stays.id}")

    def _standing(self, state: State, deploy: Deploy) -> dict[str, tuple[str, int]]:
        """Allocations of what the deploy leaves alone: their node, and how often they started."""
        changed = {c.service for c in deploy.changes if c.action != "unchanged"}
        return {a.id: (a.node, self.starts[a.id]) for a in state.allocations.values()
                if a.live and a.service not in changed and a.status == "healthy"}

    def _untouched(self, state: State, deploy: Deploy) -> None:
        begun_s, standing = self._begun[deploy.id]
        for alloc, (node, starts) in standing.items():
            if max(self.hits.get(node, 0.0), self.hits.get(alloc, 0.0)) > begun_s - RECOVERY_S:
                continue
            now = state.allocations.get(alloc)
            if now is None or now.status in ENDED or self.starts[alloc] != starts:
                became = now.status if now else "forgotten"
                raise Violation(f"{deploy.id} touched {alloc}, which it does not change: "
                                f"{became}, {self.starts[alloc]} starts")

    # -- orders and containers -------------------------------------------------------------

    def obeys(self, node: WholeNode, term: int) -> None:
        """Never an older term after a newer, whatever was restarted in between."""
        newest = self._term_of.get(node.name, 0)
        process, removed = node.process, self._removed.get(node.name, 0)
        if process is not None and removed and process.ledger.state.index >= removed:
            self._broken(f"{node.name} obeys though it knows that it was removed")
        if term < newest:
            self._broken(f"{node.name} obeys term {term} after term {newest}")
        self._term_of[node.name] = term

    def starts_container(self, node: str, order: Start, former: Container | None) -> None:
        """Only what the log has ordered, and nothing that runs already."""
        alloc = self.newest.allocations.get(order.alloc)
        if alloc is None or alloc.node != node:
            self._broken(f"{node} starts {order.alloc}, which is not its own")
        if order.restarts > alloc.restarts:
            self._broken(f"{node} starts {order.alloc} for the {order.restarts}th time")
        if former is not None and former.ended is None \
                and former.order.restarts >= order.restarts:
            self._broken(f"{node} starts {order.alloc} while it runs")
        self._in_turn(alloc)
        self.starts[order.alloc] += 1

    def _in_turn(self, alloc: Allocation) -> None:
        """What a deploy brings starts when what it depends on has passed."""
        deploy = self.newest.deploys.get(alloc.deploy)
        spec = self.newest.spec_for(alloc)
        if alloc.live or spec is None or deploy is None or deploy.outcome != "running":
            return
        for needed in spec.depends_on:
            change = deploy.change(needed)
            new = change is not None and any(not slot.keep for slot in change.slots)
            if new and needed not in deploy.healthy:
                self._broken(f"{alloc.id} starts before {needed}, on which it depends")

    def accepts(self, node: WholeNode, leader: str, term: int) -> None:
        """A session is an agent's obedience; the older leader's must not take the newer's place,
        and one that was removed has none."""
        process = node.process
        nodes = process.ledger.state.nodes if process is not None else {}
        if nodes and leader not in nodes:
            self._broken(f"{node.name} obeys {leader}, which it knows to be no node")
        self.obeys(node, term)

    def stops_container(self, node: str, alloc_id: str, there: Container | None) -> None:
        """Only what the log has given up."""
        alloc = self.newest.allocations.get(alloc_id)
        if there is None or alloc is None or alloc.status in ENDED or alloc.status == "stopping":
            return
        if alloc.node == node:
            self._broken(f"{node} stops {alloc_id}, which is {alloc.status} and wanted")

    def _broken(self, what: str) -> NoReturn:
        """The node's own code may catch what is raised: the world hears of it first."""
        self._world.fail(what)
        raise Violation(what)

    def passed(self, alloc: str, restarts: int) -> None:
        """A probe found it well."""
        self._healthy.add((alloc, restarts))

    def hit(self, *names: str) -> None:
        """The world did harm to nodes or allocations now."""
        for name in names:
            self.hits[name] = self._world.now_s


def endpoints(table: EdgeTable) -> Iterable[tuple[str, str, int]]:
    """Service, address and port of all that takes new requests."""
    for cluster in table.clusters:
        for endpoint in cluster.endpoints:
            if not endpoint.draining:
                yield cluster.service, endpoint.ip, endpoint.port


def _was(state: State, deploy: str, what: str) -> bool:
    known = state.deploys.get(deploy)
    return known is not None and bool(getattr(known, what))


def _new_events(before: State, after: State) -> list[Event]:
    last = before.events[-1][-1].index if before.events else 0
    return list(after.events_after(last))
