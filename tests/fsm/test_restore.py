"""A backup's contents come into an empty cluster whole, or not at all."""

from __future__ import annotations

from msgspec.structs import replace

from reconciler.fsm import codec
from reconciler.fsm import commands as c
from reconciler.fsm.backup import Contents, contents, decode_contents, digest, encode_contents
from reconciler.fsm.records import SealedAuthority, SecretPin, Source, Token
from reconciler.fsm.state import State
from tests.fsm.machine import Machine, cluster, service


def lived_in(*more: c.AnyCommand) -> State:
    """Two services of two revisions, a secret of two versions, a source that is synced."""
    machine = cluster()
    for _ in range(2):
        assert not machine.do(c.SetSecret("db", b"n" * 12, b"sealed"))
    machine.deploy(service("web", replicas=2), service("api"), secrets=(SecretPin("db", 2),))
    machine.deploy(service("web", replicas=3, user="7"))
    assert not machine.do(c.PutSource(Source(name="repo", url="file:///repo", secret_ref="db")))
    assert not machine.do(c.ObserveSource(name="repo", status="synced", head="a" * 40,
                                          applied="a" * 40))
    for command in more:
        assert not machine.do(command)
    return machine.state


def pieces(data: bytes, size: int = 100) -> list[c.RestoreState]:
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    return [c.RestoreState(digest(data), n, len(parts), part) for n, part in enumerate(parts)]


def restored(carried: Contents) -> Machine:
    machine = cluster(nodes=2)
    for piece in pieces(encode_contents(carried)):
        assert not machine.do(piece)
    return machine


def test_what_is_restored_is_what_was_there_field_by_field() -> None:
    before = lived_in()
    machine = restored(contents(before))
    after = machine.state
    assert after.specs == before.specs
    assert after.secrets == before.secrets
    assert after.next_vip == before.next_vip
    for name, old in before.services.items():
        new = after.services[name]
        assert [replace(r, deploy="") for r in old.revisions] == list(new.revisions)
        assert replace(old, revisions=()) == replace(new, revisions=())
    assert after.services.keys() == before.services.keys()
    source = before.sources["repo"]
    assert after.sources == {"repo": replace(
        source, status="suspended", reason="restored from a backup", since_ms=after.time_ms)}
    assert after.spec_parts == {}
    assert codec.decode_state(codec.encode_state(after)) == after


def test_what_belongs_to_the_new_cluster_stays() -> None:
    before = lived_in(
        c.SetAuthority(SealedAuthority(b"theirs", b"n" * 12, b"sealed")),
        c.CreateToken(Token(id="t-theirs", sha256="9" * 64)), c.DrainNode("node-2"))
    empty = cluster(nodes=2).state
    after = restored(contents(before)).state
    assert before.authority is not None
    assert after.authority is None
    assert "theirs" not in str(encode_contents(contents(before)))
    assert not after.nodes["node-2"].draining
    assert after.tokens.keys() == empty.tokens.keys()
    assert after.nodes.keys() == {"node-1", "node-2"}
    assert after.cluster == empty.cluster
    assert after.allocations == {}
    assert after.deploys == {}
    note = after.events[-1][-1].data
    assert "index" in str(note)


def test_a_restored_service_is_placed_and_deployed_over_as_any_other() -> None:
    machine = restored(contents(lived_in()))
    assert not machine.do(c.ScheduleAlloc(alloc="web-aaaaaa", service="web", node="node-1", slot=0))
    assert machine.state.allocations["web-aaaaaa"].live
    assert machine.state.allocations["web-aaaaaa"].revision == 2
    machine.deploy(service("web", user="9"))
    assert machine.state.services["web"].live == 3
    assert len(machine.state.services["web"].revisions) == 3


def test_a_service_that_was_never_committed_is_not_carried() -> None:
    machine = cluster()
    machine.deploy(service("web"))
    machine.start(service("api"))
    carried = contents(machine.state)
    assert list(carried.services) == ["web"]
    assert len(carried.specs) == 1


def test_a_cluster_that_holds_anything_refuses_and_says_what() -> None:
    carried = encode_contents(contents(lived_in()))
    for fill, held in (
        (c.SetSecret("token", b"n" * 12, b"s"), "secret token"),
        (c.PutSource(Source(name="repo", url="file:///x")), "source repo"),
    ):
        machine = cluster()
        assert not machine.do(fill)
        assert held in machine.do(pieces(carried)[0])
    machine = cluster()
    machine.start(service("web"))
    assert "service web" in machine.do(pieces(carried)[0])


def test_what_comes_in_between_is_not_overwritten() -> None:
    machine = cluster()
    *first, last = pieces(encode_contents(contents(lived_in())))
    for piece in first:
        assert not machine.do(piece)
    assert not machine.do(c.SetSecret("mine", b"n" * 12, b"s"))
    assert "secret mine" in machine.do(last)
    assert list(machine.state.secrets) == ["mine"]
    assert machine.state.services == {}


def test_pieces_out_of_order_damaged_or_of_two_backups_change_nothing() -> None:
    machine = cluster()
    sent = pieces(encode_contents(contents(lived_in())))
    assert "out of order" in machine.do(sent[1])
    assert not machine.do(sent[0])
    assert "out of order" in machine.do(sent[2])
    other = pieces(encode_contents(contents(cluster().state)), 1000)
    assert len(other) == 1
    assert "piece 7 of 7" in machine.do(replace(sent[0], part=7, parts=7))
    for piece in sent[1:-1]:
        assert not machine.do(piece)
    assert "not what was sent" in machine.do(replace(sent[-1], data=b"x" * 9))
    assert machine.state.services == {}
    assert not machine.do(sent[0])
    assert not machine.do(other[0])
    assert "out of order" in machine.do(sent[1])


def test_contents_that_do_not_hold_together_are_refused() -> None:
    whole = contents(lived_in())
    machine = cluster()
    for broken, reason in ((replace(whole, specs={}), "lacks a spec of"),):
        (piece,) = pieces(encode_contents(broken), 1 << 20)
        assert reason in machine.do(piece)
    (piece,) = pieces(b"\x63not ours")
    assert "format" in machine.do(piece)
    assert machine.state.services == {}


def test_contents_round_trip() -> None:
    carried = contents(lived_in())
    assert decode_contents(encode_contents(carried)) == carried
