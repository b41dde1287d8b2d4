"""The text of a join token: it comes back as it went, or says what happened to it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.api.join_token import JoinToken, format_join_token, parse_join_token
from reconciler.errors import Malformed

TOKEN = JoinToken("192.0.2.1:4400", "ab" * 32, "join-0011aabb", "s" * 43)
TEXT = format_join_token(TOKEN)
words = st.text(min_size=1, max_size=40)


@given(words, st.binary(min_size=32, max_size=32), words, words)
def test_a_token_comes_back_as_it_went(
    address: str, digest: bytes, token_id: str, secret: str
) -> None:
    token = JoinToken(address, digest.hex(), token_id, secret)
    text = format_join_token(token)
    assert parse_join_token(f" {text}\n") == token
    assert len(text.split()) == 1


@given(st.integers(0, len(TEXT) - 1), st.sampled_from("aZ0-_.=\n é"))
def test_a_changed_character_is_told(at: int, other: str) -> None:
    changed = TEXT[:at] + other + TEXT[at + 1 :]
    if changed.strip() == TEXT:
        return
    with pytest.raises(Malformed) as caught:
        parse_join_token(changed)
    assert caught.value.hint
    assert TOKEN.secret not in str(caught.value) + caught.value.hint


@given(st.integers(0, len(TEXT) - 1))
def test_a_piece_of_a_token_is_told(length: int) -> None:
    with pytest.raises(Malformed):
        parse_join_token(TEXT[:length])


@pytest.mark.parametrize("text", [
    "", "mill-join.", "mill-join..", "s3cret", TEXT * 5,
    format_join_token(JoinToken("", "ab" * 32, "i", "s")),
    format_join_token(JoinToken("a:1", "AB" * 32, "i", "s")),
])
def test_what_is_no_token_is_told(text: str) -> None:
    with pytest.raises(Malformed) as caught:
        parse_join_token(text)
    assert caught.value.hint


def test_its_secret_is_never_shown() -> None:
    assert TOKEN.secret not in repr(TOKEN)
