"""Logs stay readable: golden bytes, unknown numbers refused, states round-trip."""

from __future__ import annotations

import typing
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.executor.ledger import StateMachine
from reconciler.fsm import codec, commands
from reconciler.fsm.apply import Refused
from tests.fsm.machine import cluster, service

GOLDEN = Path(__file__).parent / "golden"
ENTRIES = ("v1.hex", "v1-membership.hex")
"""Lines of `NAME HEX`, written when the commands were: they are never regenerated."""


@pytest.mark.parametrize("file", ENTRIES)
def test_entries_of_every_age_are_still_read(file: str) -> None:
    for line in (GOLDEN / file).read_text().splitlines():
        name, data = line.split()
        entry = codec.decode_entry(bytes.fromhex(data))
        assert type(entry.command).__name__ == name
        if file != ENTRIES[0]:  # fields that came later are left out where they say nothing
            assert codec.encode_entry(entry).hex() == data


def test_a_snapshot_from_before_membership_is_still_read() -> None:
    """Three nodes, two services and their history; what came since has its default."""
    state = codec.decode_state(bytes.fromhex((GOLDEN / "state-v1.hex").read_text()))
    assert sorted(state.nodes) == ["node-1", "node-2", "node-3"]
    assert sorted(state.services) == ["api", "web"]
    assert state.services["web"].live == 2
    assert {(n.log, n.draining, n.key_sha256) for n in state.nodes.values()} == {("", False, "")}
    assert state.authority is None
    (token,) = state.tokens.values()
    assert (token.role, token.services, token.uses, token.expires_ms) == ("admin", (), 0, 0)


def test_every_command_has_a_number_of_its_own_and_a_golden_line() -> None:
    kinds = typing.get_args(commands.AnyCommand)
    numbers = [kind.__struct_config__.tag for kind in kinds]
    assert len(set(numbers)) == len(numbers)
    lines = [line for file in ENTRIES for line in (GOLDEN / file).read_text().splitlines()]
    assert {line.split()[0] for line in lines} == {kind.__name__ for kind in kinds}


def test_an_unknown_command_is_refused_by_number_and_changes_nothing() -> None:
    machine = StateMachine()
    unknown = bytes([codec.VERSION]) + msgspec.msgpack.encode([1, {"c": 9999}])
    result = machine.apply(1, unknown)
    assert isinstance(result, Refused)
    assert "9999" in result.reason
    assert machine.state.services == {}


@given(st.binary(max_size=200))
@settings(max_examples=200)
def test_any_bytes_are_refused_or_applied_but_never_raise(data: bytes) -> None:
    machine = StateMachine()
    refused = machine.apply(1, data)
    assert refused is None or isinstance(refused, Refused)
    machine.apply(2, bytes([codec.VERSION]) + data)
    assert codec.decode_state(codec.encode_state(machine.state)) == machine.state


def test_a_state_round_trips_through_its_snapshot() -> None:
    machine = cluster()
    machine.deploy(service("web", replicas=2), service("api"))
    machine.start(service("web", user="1", replicas=2))
    data = codec.encode_state(machine.state)
    assert codec.decode_state(data) == machine.state


@pytest.mark.parametrize("data", [b"", b"\x07rest", b"\x01\xc1"])
def test_a_snapshot_of_another_format_is_refused(data: bytes) -> None:
    with pytest.raises(codec.Undecodable):
        codec.decode_state(data)
