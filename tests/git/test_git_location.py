"""URLs, branches, paths and credentials: what is taken, what is refused, and how it is said."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.errors import Unprocessable
from reconciler.git.location import (
    BadCredentials,
    BadLocation,
    Location,
    check_branch,
    check_source,
    is_loopback,
    parse_credentials,
    parse_location,
    path_parts,
    redact,
)


@pytest.mark.parametrize(("url", "location"), [
    ("https://git.example.com/team/app.git",
     Location("http", "https://git.example.com", "/team/app.git")),
    ("HTTPS://Git.Example.com:8443/app", Location("http", "https://git.example.com:8443", "/app")),
    ("http://127.0.0.1:3000/app.git", Location("http", "http://127.0.0.1:3000", "/app.git")),
    ("http://[::1]:3000/app.git", Location("http", "http://[::1]:3000", "/app.git")),
    ("https://h.example//elsewhere.example/x",
     Location("http", "https://h.example", "/elsewhere.example/x")),
    ("file:///srv/git/my%20app", Location("local", "", "/srv/git/my app")),
    ("file://localhost/srv/app", Location("local", "", "/srv/app")),
    ("/srv/git/app.git", Location("local", "", "/srv/git/app.git")),
])
def test_places_that_a_source_may_be_at(url: str, location: Location) -> None:
    assert parse_location(url) == location


@pytest.mark.parametrize("url", [
    "", "ext::sh -c touch% /tmp/pwned", "ext::x", "ftp://h/app", "ftps://h/app", "git://h/app",
    "--upload-pack=touch", "-x", "-/srv", "app", "./app", "../app", "~/app", "C:\\app", "file:",
    "file://host/app", "file://app", "file:///a?x", "https://", "https:///app", "https://h",
    "https://h/", "https://h:0/a", "https://h:99999/a", "https://h:x/a", "https://-h/a",
    "https://h_/a", "https://[::1/a", "https://[zz]/a", "https://h/a?b=c", "https://h/a#f",
    "https://h/a b", "https://h\\x/a", "https://h/a\n", "https://h/a\0", "/srv/\0", "/srv/a\nb",
    "javascript:alert(1)", "data:,x", "https://h/" + "a" * 2100, "file:///srv/%00",
])
def test_everything_else_is_refused(url: str) -> None:
    with pytest.raises(BadLocation):
        parse_location(url)


@pytest.mark.parametrize("url", [
    "ssh://git@example.com/app.git", "ssh://example.com/app", "git+ssh://h/app", "ssh+git://h/app",
    "git@example.com:team/app.git", "ada@10.0.0.1:app",
])
def test_ssh_is_refused_as_not_built_yet(url: str) -> None:
    with pytest.raises(BadLocation, match="ssh sources are not built yet"):
        parse_location(url)


@pytest.mark.parametrize("url", [
    "https://ada:s3cret@example.com/app", "http://s3cret@127.0.0.1/app", "https://a:s3cret@/x",
    "ftp://ada:s3cret@h/app", "ssh://ada:s3cret@h/app", "file://ada:s3cret@h/app",
])
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(BadLocation) as refused:
        parse_location(url)
    assert "s3cret" not in f"{refused.value} {refused.value.hint}"


@given(st.text(max_size=60) | st.from_regex(r"\A(https?|file|ssh|ext)(://|::?)[^\n]{0,40}\Z"))
def test_any_text_is_a_place_or_refused(url: str) -> None:
    try:
        location = parse_location(url)
    except BadLocation:
        return
    assert location.path.startswith("/")
    assert "@" not in location.origin
    assert location.kind == "local" or location.origin.startswith(("http://", "https://"))


@pytest.mark.parametrize(("url", "loopback"), [
    ("http://127.0.0.1/a", True), ("http://127.9.9.9:80/a", True), ("http://[::1]/a", True),
    ("http://localhost/a", True), ("/srv", True), ("http://10.0.0.1/a", False),
    ("http://127.0.0.1.example.com/a", False), ("http://localhost.example.com/a", False),
])
def test_loopback_is_an_address_not_a_likeness(url: str, loopback: bool) -> None:
    assert is_loopback(parse_location(url)) is loopback


@pytest.mark.parametrize(("secret", "user", "password"), [
    ("ada:s3:cret\n", "ada", "s3:cret"), ("ghp_abc", "x-access-token", "ghp_abc"),
])
def test_a_secret_is_user_and_password_or_a_token(secret: str, user: str, password: str) -> None:
    held = parse_credentials(secret, parse_location("https://h/a"))
    assert (held.username, held.password) == (user, password)
    assert password not in repr(held)


@pytest.mark.parametrize("secret", ["", "\n", "ada:", "a\nb:c", "tok\x00en",
                                    "-----BEGIN OPENSSH PRIVATE KEY-----\nx"])
def test_secrets_that_are_no_credentials_are_refused(secret: str) -> None:
    with pytest.raises(BadCredentials):
        parse_credentials(secret, parse_location("https://h/a"))


def test_credentials_travel_in_clear_to_loopback_only() -> None:
    assert parse_credentials("a:b", parse_location("http://127.0.0.1/a")).username == "a"
    assert parse_credentials("a:b", parse_location("https://h/a")).username == "a"
    with pytest.raises(BadCredentials, match="loopback"):
        parse_credentials("a:b", parse_location("http://10.0.0.1/a"))


@pytest.mark.parametrize("branch", ["main", "HEAD", "team/x-1", "größe", "v1.2", "a@b", "#1"])
def test_branches_that_git_knows(branch: str) -> None:
    assert check_branch(branch) == branch


@pytest.mark.parametrize("branch", [
    "", "-x", "/x", "x/", "a..b", "a b", "a~1", "a^", "a:b", "a?", "a*", "a[", "a\\b", "x.lock",
    "x.lock/y", "@", "a@{1}", ".x", "a/.x", "a//b", "x.", "a\x7f", "a\nb", "refs/heads/main",
    "x" * 256, "\ud800",
])
def test_branches_that_git_forbids(branch: str) -> None:
    with pytest.raises(BadLocation):
        check_branch(branch)


@pytest.mark.parametrize(("path", "parts"), [
    ("/", ()), ("", ()), ("/deploy/prod", ("deploy", "prod")),
    ("deploy//prod/", ("deploy", "prod")),
])
def test_paths_lead_down(path: str, parts: tuple[str, ...]) -> None:
    assert path_parts(path) == parts


@pytest.mark.parametrize("path", ["..", "/a/../b", "./a", "/.git", "/a/.GIT/b", "a\\b", "a\nb",
                                  "x" * 1025])
def test_paths_that_lead_elsewhere_are_refused(path: str) -> None:
    with pytest.raises(BadLocation):
        path_parts(path)


@given(st.text(max_size=40))
def test_whatever_a_path_is_its_parts_stay_below(path: str) -> None:
    with contextlib.suppress(Unprocessable):
        assert not {"..", ".", ""} & set(path_parts(path))


def test_redaction_takes_user_info_and_known_secrets() -> None:
    text = "fetch https://ada:s3cret@h/a and git+x://tok@h failed with tok-123"
    assert redact(text, "tok-123", "") == \
        "fetch https://***@h/a and git+x://***@h failed with ***"


def test_a_whole_source_is_checked_before_it_is_added() -> None:
    assert check_source("https://h/a", "main", "/", 10_000) == parse_location("https://h/a")
    check_source("http://127.0.0.1/a", "main", "/", 1_000, with_credentials=True)
    check_source("http://10.0.0.1/a", "main", "/", 1_000)
    for url, branch, path, poll_ms, held in (
        ("ftp://h/a", "main", "/", 10_000, False), ("https://h/a", "-b", "/", 10_000, False),
        ("https://h/a", "main", "/..", 10_000, False), ("https://h/a", "main", "/", 999, False),
        ("https://h/a", "main", "/", 86_400_001, False),
        ("http://10.0.0.1/a", "main", "/", 10_000, True),
    ):
        with pytest.raises((BadLocation, BadCredentials)):
            check_source(url, branch, path, poll_ms, with_credentials=held)
