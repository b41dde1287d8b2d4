"""The scheme follows from the host."""

from __future__ import annotations

import pytest

from reconciler.api.address import base_url, is_loopback


@pytest.mark.parametrize(("address", "url"), [
    ("127.0.0.1:4400", "http://127.0.0.1:4400"), ("127.9.9.9:1", "http://127.9.9.9:1"),
    ("localhost:4400", "http://localhost:4400"), ("[::1]:4400", "http://[::1]:4400"),
    ("10.0.0.1:4400", "https://10.0.0.1:4400"), ("[fd00::1]:4400", "https://[fd00::1]:4400"),
    ("mill.example:4400", "https://mill.example:4400"), ("10.0.0.1", "https://10.0.0.1"),
    ("127.evil.example:4400", "https://127.evil.example:4400"),
    ("http://10.0.0.1:4400/", "http://10.0.0.1:4400"),
    ("https://127.0.0.1:4400", "https://127.0.0.1:4400"),
])
def test_scheme_is_a_function_of_the_host(address: str, url: str) -> None:
    assert base_url(address) == url


def test_loopback_is_what_no_other_machine_hears() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.255.0.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "128.0.0.1", "::", "example", "")))
