"""Repositories that mean harm, made with git itself where git allows, from raw objects else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from dulwich.objects import Blob, Commit, ObjectID, ShaFile, Tree
from hypothesis import given
from hypothesis import strategies as st

from reconciler.git import findings
from reconciler.git.findings import Bounds, Found, Refused
from reconciler.git.location import parse_location
from reconciler.git.poll import Poller
from reconciler.git.remote import one_line
from reconciler.git.tree import TreeRefused, read_manifests
from tests.git.git_fixtures import GitServer, Repository

WEB = b'service "web" { image = "registry.example.com/web:v1" }\n'
BLOB, TREE, LINK, MODULE = "100644", "040000", "120000", "160000"


@pytest.fixture(params=["file", "http"])
def url(request: pytest.FixtureRequest, repository: Repository, server: GitServer) -> str:
    return repository.url if request.param == "file" else server.url(repository)


async def look(poller: Poller, url: str) -> Found:
    return await poller.look(parse_location(url), "main", "/", "")


async def reason(poller: Poller, url: str, sha: str) -> str:
    """Why the head is refused."""
    found = await look(poller, url)
    assert isinstance(found, Refused), found
    assert found.head == sha
    return found.reason


async def test_a_link_named_like_a_manifest_is_refused(
    poller: Poller, repository: Repository, url: str
) -> None:
    (repository.folder / "web.mill").symlink_to("/etc/shadow")
    sha = repository.commit_all()
    assert "web.mill is a link" in await reason(poller, url, sha)


async def test_links_to_folders_are_not_followed(
    poller: Poller, repository: Repository, url: str, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "evil.mill").write_bytes(WEB)
    (repository.folder / "inside").symlink_to(tmp_path / "outside")
    repository.commit({"web.mill": WEB})
    found = await look(poller, url)
    assert isinstance(found, findings.Commit)
    assert list(found.files) == ["web.mill"]


async def test_a_submodule_is_not_followed(
    poller: Poller, repository: Repository
) -> None:
    blob = repository.blob(WEB)
    repository.commit_tree(repository.tree((MODULE, "commit", "1" * 40, b"library"),
                                           (BLOB, "blob", blob, b"web.mill")))
    found = await look(poller, repository.url)
    assert isinstance(found, findings.Commit)
    assert list(found.files) == ["web.mill"]


async def test_a_submodule_named_like_a_manifest_is_refused(
    poller: Poller, repository: Repository
) -> None:
    sha = repository.commit_tree(repository.tree((MODULE, "commit", "1" * 40, b"web.mill")))
    assert "web.mill is a submodule" in await reason(poller, repository.url, sha)


@pytest.mark.parametrize(("name", "says"), [
    (b"a\nb.mill", "not printable"),
    (b"a\\b.mill", "not printable"),
    (b"a\x1b[31m.mill", "not printable"),
    ("\u202egpj.mill".encode(), "not printable"),
    (b"\xff.mill", "not UTF-8"),
])
async def test_odd_names_of_manifests_are_refused(
    poller: Poller, repository: Repository, name: bytes, says: str
) -> None:
    sha = repository.commit_tree(repository.tree((BLOB, "blob", repository.blob(WEB), name)))
    told = await reason(poller, repository.url, sha)
    assert says in told
    assert told.isprintable()


async def test_odd_names_of_other_files_do_no_harm(
    poller: Poller, repository: Repository
) -> None:
    blob = repository.blob(WEB)
    repository.commit_tree(repository.tree(
        (BLOB, "blob", blob, b"\xff\n.txt"), (BLOB, "blob", blob, "größe.mill".encode()),
        (BLOB, "blob", blob, b"web.MILL")))
    found = await look(poller, repository.url)
    assert isinstance(found, findings.Commit)
    assert found.files == {"größe.mill": WEB}


async def test_a_tree_bomb_is_refused(poller: Poller, repository: Repository, url: str) -> None:
    tree = repository.tree(*((BLOB, "blob", repository.blob(WEB), b"f%d" % n) for n in range(10)))
    for _ in range(6):
        tree = repository.tree(*((TREE, "tree", tree, b"d%d" % n) for n in range(10)))
    sha = repository.commit_tree(tree)  # ten million paths
    assert "more than 50,000 files and folders" in await reason(poller, url, sha)


async def test_folders_nested_too_deep_are_refused(
    poller: Poller, repository: Repository
) -> None:
    sha = repository.commit({"/".join("d" * 16) + "/web.mill": WEB})
    assert "nested deeper than 16" in await reason(poller, repository.url, sha)


async def test_too_many_manifests_are_refused(
    poller: Poller, repository: Repository
) -> None:
    blob = repository.blob(b"#\n")
    rows = [(BLOB, "blob", blob, b"s%04d.mill" % n) for n in range(1001)]
    sha = repository.commit_tree(repository.tree(*rows))
    assert "more than 1,000 manifests" in await reason(poller, repository.url, sha)
    repository.commit_tree(repository.tree(*rows[:1000]))
    found = await look(poller, repository.url)
    assert isinstance(found, findings.Commit)
    assert len(found.files) == 1000


async def test_a_manifest_over_256_kib_is_refused(
    poller: Poller, repository: Repository, url: str
) -> None:
    sha = repository.commit({"web.mill": os.urandom(256 * 1024 + 1)})
    assert await reason(poller, url, sha) == "web.mill is larger than 256 KiB"
    exact = os.urandom(256 * 1024)
    repository.commit({"web.mill": exact})
    found = await look(poller, url)
    assert isinstance(found, findings.Commit)
    assert found.files == {"web.mill": exact}


async def test_manifests_over_2_mib_together_are_refused(
    poller: Poller, repository: Repository
) -> None:
    sha = repository.commit({f"s{n}.mill": os.urandom(250 * 1024) for n in range(9)})
    assert await reason(poller, repository.url, sha) == "the manifests together are over 2048 KiB"


async def test_author_and_subject_are_cut_and_cleaned(
    poller: Poller, repository: Repository
) -> None:
    repository.commit({"web.mill": WEB}, "\x1b[2Jhidden \u202e" + "x" * 500 + "\nbody")
    found = await look(poller, repository.url)
    assert isinstance(found, findings.Commit)
    assert found.subject == ("\ufffd[2Jhidden \ufffd" + "x" * 500)[:200]
    assert found.author == "Ada <ada@example.com>"


@given(st.binary(max_size=2000))
def test_any_bytes_become_one_short_printable_line(text: bytes) -> None:
    line = one_line(text)
    assert line.isprintable()
    assert len(line) <= 200


def made(*rows: tuple[bytes, int, ShaFile]) -> tuple[Commit, dict[ObjectID, ShaFile]]:
    """A commit of one tree whose names no git program would write."""
    tree = Tree.from_string(b"".join(
        b"%o %s\0" % (mode, name) + bytes.fromhex(found.id.decode()) for name, mode, found in rows))
    commit = Commit()
    commit.tree = tree.id
    return commit, {tree.id: tree} | {found.id: found for _, _, found in rows}


@pytest.mark.parametrize("name", [b"..", b".", b".git", b".GIT", b"../../etc/x.mill", b"a/b.mill"])
def test_entries_that_git_forbids_refuse_the_tree(name: bytes) -> None:
    blob = Blob.from_string(WEB)
    commit, objects = made((name, stat.S_IFREG | 0o644, blob))
    with pytest.raises(TreeRefused, match="git forbids"):
        read_manifests(objects.__getitem__, commit, (), Bounds())


def test_a_tree_that_lies_about_kinds_is_refused() -> None:
    blob, tree = Blob.from_string(WEB), Tree()
    commit, objects = made((b"web.mill", stat.S_IFREG | 0o644, tree))
    with pytest.raises(TreeRefused, match="says file"):
        read_manifests(objects.__getitem__, commit, (), Bounds())
    commit, objects = made((b"deploy", stat.S_IFDIR, blob))
    with pytest.raises(TreeRefused, match="says folder"):
        read_manifests(objects.__getitem__, commit, (), Bounds())


@given(st.lists(st.tuples(
    st.binary(min_size=1, max_size=12).filter(lambda n: b"\0" not in n),
    st.sampled_from([0o100644, 0o100755, 0o120000, 0o160000, 0o040000, 0o100600, 0]),
), max_size=12, unique_by=lambda row: row[0]))
def test_whatever_a_tree_holds_it_is_read_or_refused(rows: list[tuple[bytes, int]]) -> None:
    blob, empty = Blob.from_string(b"#"), Tree()
    commit, objects = made(*((name, mode, empty if mode == 0o040000 else blob)
                             for name, mode in rows))
    try:
        files = read_manifests(objects.__getitem__, commit, (), Bounds())
    except TreeRefused:
        return
    assert set(files) == {n.decode() for n, m in rows if n.endswith(b".mill") and m != 0o040000}
