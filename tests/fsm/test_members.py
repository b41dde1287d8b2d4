"""Nodes join with tokens, drain and leave; tokens are made, spent and revoked."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from reconciler.fsm import commands as c
from reconciler.fsm.codec import decode_state, encode_state
from reconciler.fsm.events import Note
from reconciler.fsm.records import Failure, SealedAuthority, Token
from tests.fsm.machine import Machine, cluster, service

HOUR_MS = 3_600_000


def invite(machine: Machine, name: str = "t-join", uses: int = 1, last_ms: int = HOUR_MS) -> str:
    assert not machine.do(c.CreateToken(Token(
        id=name, sha256=f"{len(machine.state.tokens):064x}", role="join", uses=uses,
        expires_ms=machine.now_ms + last_ms)))
    return name


def joining(token: str, name: str = "m-1", key: str = "a", ip: str = "") -> c.JoinNode:
    ip = ip or f"10.0.0.{name[-1]}"
    return c.JoinNode(token=token, key_sha256=key * 64, name=name, api=f"{ip}:4400",
                      agent=f"{ip}:4402", log=f"{ip}:4401", cpu_milli=1_000,
                      memory_bytes=1_000_000_000)


def told(machine: Machine) -> Note:
    """The newest event."""
    data = machine.state.events[-1][-1].data
    assert isinstance(data, Note)
    return data


# -- joining ---------------------------------------------------------------------------------


def test_a_machine_joins_under_the_smallest_free_number_and_is_down_until_heard() -> None:
    machine = cluster()
    assert not machine.do(c.RemoveNode("node-2"))
    assert not machine.do(joining(invite(machine)))
    node = machine.state.nodes["m-1"]
    assert (node.number, node.status, node.log) == (2, "down", "10.0.0.1:4401")
    assert machine.state.tokens["t-join"].joined == ("a" * 64,)
    assert told(machine) == Note(kind="node_joined", subject="m-1", node="m-1",
                                 message="with token t-join")


def test_the_same_machine_asks_again_and_spends_nothing() -> None:
    machine = cluster()
    token = invite(machine)
    assert not machine.do(joining(token))
    before = machine.state
    assert not machine.do(joining(token))
    assert machine.state.nodes == before.nodes
    assert machine.state.tokens == before.tokens
    assert machine.state.events == before.events
    assert not machine.do(joining(token, ip="10.0.0.9"))
    assert machine.state.nodes["m-1"].api == "10.0.0.9:4400"
    assert machine.state.nodes["m-1"].number == before.nodes["m-1"].number


def test_another_machine_never_gets_a_name_that_is_taken() -> None:
    machine = cluster()
    token = invite(machine, uses=9)
    assert not machine.do(joining(token, "m-1", "a"))
    assert not machine.do(joining(token, "m-2", "b"))
    nodes = machine.state.nodes
    assert "m-1 is taken" in machine.do(joining(token, "m-1", "b"))
    assert "node-1 is taken" in machine.do(joining(token, "node-1", "c"))
    assert "joined as m-1 already" in machine.do(joining(token, "m-3", "a"))
    assert "address of m-1" in machine.do(joining(token, "m-3", "c", ip="10.0.0.1"))
    assert machine.state.nodes == nodes
    assert len(machine.state.tokens[token].joined) == 2


def test_a_token_is_good_for_its_uses_and_no_more() -> None:
    machine = cluster()
    token = invite(machine, uses=2)
    assert not machine.do(joining(token, "m-1", "a"))
    assert not machine.do(joining(token, "m-2", "b"))
    assert "spent: 2 of 2" in machine.do(joining(token, "m-3", "c"))
    assert not machine.do(joining(token, "m-2", "b"))


def test_a_removed_machine_does_not_come_back_with_its_spent_token() -> None:
    machine = cluster()
    token = invite(machine)
    assert not machine.do(joining(token))
    assert not machine.do(c.RemoveNode("m-1"))
    assert "spent" in machine.do(joining(token))
    assert not machine.do(joining(invite(machine, "t-new")))


def test_a_token_that_is_over_revoked_or_of_another_role_lets_nobody_in() -> None:
    machine = cluster()
    token = invite(machine, last_ms=5_000)
    machine.now_ms += 5_000
    assert "expired" in machine.do(joining(token))
    token = invite(machine, "t-gone")
    assert not machine.do(c.RevokeToken(token))
    assert "revoked" in machine.do(joining(token))
    assert "no such join token" in machine.do(joining("root"))
    assert "m-1" not in machine.state.nodes


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a.b", "a" * 64, "a\n", "é", "a_b"])
def test_a_node_has_the_name_of_a_host(name: str) -> None:
    machine = cluster()
    assert "not the name of a node" in machine.do(
        replace(joining(invite(machine)), name=name))
    assert not machine.do(replace(joining("t-join"), name="a" * 63))


def test_a_key_is_a_digest_so_that_none_passes_for_a_founding_nodes() -> None:
    machine = cluster()
    assert "SHA-256" in machine.do(replace(joining(invite(machine), "node-1"), key_sha256=""))


def test_the_254th_node_is_one_too_many() -> None:
    machine = cluster(1)
    token = invite(machine, uses=253, last_ms=HOUR_MS)
    for number in range(2, 254):
        assert not machine.do(replace(
            joining(token, f"m-{number}", ip=f"10.0.1.{number}"), key_sha256=f"{number:064x}"))
    assert machine.state.nodes["m-253"].number == 253
    assert "253 nodes" in machine.do(joining(token, "one-more", "f", ip="10.9.9.9"))


# -- leaving, draining -----------------------------------------------------------------------


def test_a_node_with_allocations_is_not_removed_and_says_which() -> None:
    machine = cluster(2)
    machine.deploy(service(replicas=5))
    refused = machine.do(c.RemoveNode("node-1"))
    assert "web-" in refused
    assert "and 2 more" in refused
    assert not machine.do(c.SetNodeStatus("node-1", "down", "gone"))
    assert not machine.do(c.RemoveNode("node-1"))
    assert told(machine).kind == "node_removed"
    assert list(machine.state.nodes) == ["node-2"]


def test_a_node_that_a_deploy_is_about_to_use_is_not_removed() -> None:
    machine = cluster(2)
    deploy = machine.start(service())
    assert machine.do(c.RemoveNode("node-1")) == f"{deploy} is about to start something on node-1"
    assert not machine.do(c.RollBackDeploy(deploy, Failure(reason="so")))
    assert not machine.do(c.EndRollback(deploy, "rolled_back"))
    assert not machine.do(c.RemoveNode("node-1"))


def test_the_last_node_stays() -> None:
    machine = cluster(1)
    assert "last node" in machine.do(c.RemoveNode("node-1"))


def test_nothing_new_comes_to_a_draining_node_until_it_is_undrained() -> None:
    machine = cluster(1)
    deploy = machine.start(service())
    assert not machine.do(c.DrainNode("node-1"))
    assert told(machine) == Note(kind="node_draining", subject="node-1", node="node-1")
    place = c.ScheduleAlloc(alloc="web-x", service="web", node="node-1", slot=0, deploy=deploy)
    assert "not ready" in machine.do(place)
    assert "already" in machine.do(c.DrainNode("node-1"))
    assert not machine.do(c.UndrainNode("node-1"))
    assert told(machine).kind == "node_undrained"
    assert not machine.do(place)
    assert "not draining" in machine.do(c.UndrainNode("node-1"))


def test_what_stands_on_a_draining_node_stays_live() -> None:
    machine = cluster(1)
    machine.deploy(service())
    before = machine.state.allocations
    machine.do(c.DrainNode("node-1"))
    assert machine.state.allocations == before


def test_a_draining_node_that_comes_back_is_draining_still() -> None:
    machine = cluster()
    machine.do(c.DrainNode("node-1"))
    assert not machine.do(c.SetNodeStatus("node-1", "down"))
    assert not machine.do(c.SetNodeStatus("node-1", "ready", "it answers again"))
    assert machine.state.nodes["node-1"].status == "draining"
    assert "already" in machine.do(c.SetNodeStatus("node-1", "ready"))
    machine.do(c.SetNodeStatus("node-1", "down"))
    machine.do(c.UndrainNode("node-1"))
    assert machine.state.nodes["node-1"].status == "down"
    machine.do(c.DrainNode("node-1"))
    assert machine.state.nodes["node-1"].status == "down"
    assert machine.do(c.SetNodeStatus("node-2", "draining"))


@pytest.mark.parametrize("command", [c.DrainNode("x"), c.UndrainNode("x"), c.RemoveNode("x")])
def test_an_unknown_node_is_named(command: c.AnyCommand) -> None:
    assert cluster().do(command) == "no node x"


def test_a_node_that_registers_again_keeps_its_log_and_its_drain() -> None:
    machine = cluster()
    again = c.RegisterNode(name="node-1", number=1, api="a:1", agent="a:2", cpu_milli=1,
                           memory_bytes=1, log="a:3")
    machine.do(c.DrainNode("node-1"))
    assert not machine.do(again)
    assert not machine.do(replace(again, log=""))
    node = machine.state.nodes["node-1"]
    assert (node.log, node.draining, node.status) == ("a:3", True, "draining")


# -- tokens ----------------------------------------------------------------------------------


def test_a_token_carries_the_logs_time_and_is_told_without_its_secret() -> None:
    machine = cluster()
    token = Token(id="t-1", sha256="5" * 64, role="deploy", services=("api", "web"), at_ms=7,
                  joined=("x",))
    assert not machine.do(c.CreateToken(token))
    kept = machine.state.tokens["t-1"]
    assert kept == replace(token, at_ms=machine.state.time_ms, joined=())
    assert told(machine) == Note(kind="token_created", subject="t-1",
                                 message="deploy, for api, web")
    assert "already" in machine.do(c.CreateToken(replace(token, sha256="6" * 64)))
    assert "another token's" in machine.do(c.CreateToken(replace(token, id="t-2")))


@pytest.mark.parametrize(("token", "refused"), [
    (Token(id="t", sha256="x"), "digest"),
    (Token(id="", sha256="5" * 64), "already"),
    (Token(id="t", sha256="5" * 64, role="read", services=("web",)), "not bound to services"),
    (Token(id="t", sha256="5" * 64, role="join", expires_ms=10**15), "1 to 253 uses"),
    (Token(id="t", sha256="5" * 64, role="join", uses=1), "an end"),
    (Token(id="t", sha256="5" * 64, expires_ms=1), "expired already"),
])
def test_a_token_that_makes_no_sense_is_refused(token: Token, refused: str) -> None:
    machine = cluster()
    assert refused in machine.do(c.CreateToken(token))
    assert list(machine.state.tokens) == ["root"]


def test_the_last_admin_token_that_lasts_is_not_revoked() -> None:
    machine = cluster()
    assert "last admin" in machine.do(c.RevokeToken("root"))
    machine.do(c.CreateToken(Token(id="t-day", sha256="5" * 64,
                                   expires_ms=machine.now_ms + HOUR_MS)))
    assert "last admin" in machine.do(c.RevokeToken("root"))
    machine.do(c.CreateToken(Token(id="t-2", sha256="6" * 64)))
    assert not machine.do(c.RevokeToken("root"))
    assert told(machine) == Note(kind="token_revoked", subject="root", message="admin")
    assert "no token root" in machine.do(c.RevokeToken("root"))
    assert not machine.do(c.RevokeToken("t-day"))


def test_tokens_that_ended_are_forgotten_with_the_rest() -> None:
    machine = cluster()
    invite(machine, last_ms=5_000)
    invite(machine, "t-later")
    machine.now_ms += 60_000
    machine.do(c.Trim(machine.now_ms))
    assert sorted(machine.state.tokens) == ["root", "t-later"]


def test_there_is_a_bound_on_tokens() -> None:
    machine = cluster()
    for number in range(999):
        assert not machine.do(c.CreateToken(Token(id=f"t-{number}", sha256=f"{number + 1:064x}")))
    assert "1000 tokens" in machine.do(c.CreateToken(Token(id="t-x", sha256="f" * 64)))


def test_the_authority_is_set_once_and_survives_a_snapshot() -> None:
    machine = cluster()
    authority = SealedAuthority(b"pem", b"n" * 12, b"sealed")
    assert not machine.do(c.SetAuthority(authority))
    assert "already" in machine.do(c.SetAuthority(replace(authority, sealed=b"other")))
    assert machine.state.authority == authority
    assert decode_state(encode_state(machine.state)) == machine.state
