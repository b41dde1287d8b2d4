from __future__ import annotations

from reconciler.api.services import NodesView as NodesViewProtocol
from reconciler.clock import FakeClock
from reconciler.executor.agent.orders import Beat, Inventory
from reconciler.executor.ledger import StateMachine
from reconciler.executor.links import Credentials, Link, Links
from reconciler.fsm import commands as c
from reconciler.fsm.codec import Entry, encode_entry
from reconciler.node_backend import NodesView
from tests.replica import memory_ledger


def founded(name: str) -> bytes:
    return encode_entry(Entry(1, c.InitCluster(name, "token", "00" * 32)))


def registered(number: int) -> bytes:
    return encode_entry(Entry(number, c.RegisterNode(
        name=f"node-{number}", number=number, api="127.0.0.1:1", agent="127.0.0.1:2",
        cpu_milli=1000, memory_bytes=1 << 30)))


def test_what_is_shown_never_goes_back_while_the_log_is_replayed() -> None:
    entries = {1: founded("mill"), 2: registered(1), 3: registered(2)}
    machine = StateMachine()
    for index, entry in entries.items():
        machine.apply(index, entry)
    before = machine.state
    assert set(before.nodes) == {"node-1", "node-2"}
    machine.reset()
    for index in (1, 2):
        machine.apply(index, entries[index])
        assert machine.state is before
    machine.apply(3, entries[3])
    assert machine.state is not before
    assert machine.state == before
    machine.apply(4, registered(3))
    assert set(machine.state.nodes) == {"node-1", "node-2", "node-3"}


def test_a_replay_begins_with_the_snapshot_and_ends_where_it_was() -> None:
    machine = StateMachine()
    machine.apply(1, founded("mill"))
    snapshot = machine.dump()
    machine.apply(2, registered(1))
    before = machine.state
    machine.reset()
    machine.load(snapshot)
    assert machine.state is before
    assert machine.dump() == snapshot, "the log's own snapshots are of what it has replayed"
    machine.apply(2, registered(1))
    assert machine.state == before


def test_the_leader_hears_from_a_beat_which_disk_has_closed_a_log() -> None:
    clock = FakeClock()
    ledger, _ = memory_ledger(clock)
    links = Links(ledger, "node-1", Credentials(b"", b"", b""), clock)
    link = links._links["node-2"] = Link("node-2", "127.0.0.1:2", clock, links.wake)
    own = ["its own reason (/data/log)"]
    view: NodesViewProtocol = NodesView(
        lambda: links, "node-1", lambda: own[0], lambda _: True)
    link.hear(Inventory(node="node-2"))
    link.hear(Beat(at_ms=0, log_error="No space left on device (/data/log)"))
    assert view.log_error("node-2") == "No space left on device (/data/log)"
    assert view.log_error("node-1") == own[0]
    assert view.log_error("node-3") == ""
    link.hear(Beat(at_ms=1))
    assert view.log_error("node-2") == ""
