"""Buckets of wrong tokens: each address has its own, and all of them have a bound."""

from __future__ import annotations

from reconciler.api.limits import BURST, MAX_ADDRESSES, Failures
from reconciler.clock import FakeClock


def worn(failures: Failures, host: str) -> None:
    for _ in range(BURST):
        failures.count(host)


def test_each_address_has_its_own() -> None:
    failures = Failures(FakeClock())
    worn(failures, "10.0.0.1")
    refused = failures.exhausted("10.0.0.1")
    assert refused is not None
    assert refused.retry_after_s == 1
    assert failures.exhausted("10.0.0.2") is None


def test_it_fills_again_up_to_its_size() -> None:
    clock = FakeClock()
    failures = Failures(clock)
    worn(failures, "x")
    clock.advance(1)
    assert failures.exhausted("x") is None
    failures.count("x")
    assert failures.exhausted("x") is not None
    clock.advance(10_000)
    worn(failures, "x")
    assert failures.exhausted("x") is not None


def test_one_machines_many_ipv6_addresses_are_one() -> None:
    failures = Failures(FakeClock())
    worn(failures, "2001:db8::1")
    assert failures.exhausted("2001:db8::ffff") is not None
    assert failures.exhausted("2001:db8:0:1::1") is None


def test_it_remembers_a_bounded_number_of_addresses() -> None:
    failures = Failures(FakeClock())
    worn(failures, "first")
    for number in range(MAX_ADDRESSES):
        failures.count(str(number))
    assert len(failures._buckets) == MAX_ADDRESSES
    assert failures.exhausted("first") is None
