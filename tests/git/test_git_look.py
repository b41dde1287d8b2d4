"""Looking at real repositories, over a folder and over HTTP, through real children."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from reconciler.git.findings import (
    Bounds,
    Commit,
    Found,
    Missing,
    Refused,
    Unchanged,
    Unreachable,
)
from reconciler.git.location import Credentials, parse_location
from reconciler.git.poll import Poller
from tests.git.git_fixtures import DrippingServer, GitServer, Repository, git

WEB = 'service "web" { image = "registry.example.com/web:v1" }\n'


async def look(
    poller: Poller, url: str, last: str = "", *, branch: str = "main", path: str = "/",
    credentials: Credentials | None = None, deadline_s: float = 60.0,
) -> Found:
    return await poller.look(parse_location(url), branch, path, last, credentials=credentials,
                             deadline_s=deadline_s)


def children() -> set[int]:
    """The reading children of this process."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            line = Path(f"/proc/{pid}/cmdline")
            if line.exists() and b"reconciler.git.fetch" in line.read_bytes():
                found.add(int(pid))
    return found


@pytest.fixture(params=["folder", "bare", "http"])
def url(
    request: pytest.FixtureRequest, repository: Repository, server: GitServer, tmp_path: Path
) -> str:
    match request.param:
        case "folder":
            return str(repository.folder)
        case "bare":
            bare = tmp_path / "bare.git"
            git(tmp_path, "init", "-q", "--bare", "-b", "main", str(bare))
            git(repository.folder, "remote", "add", "origin", str(bare))
            return str(bare)
        case _:
            return server.url(repository)


def publish(repository: Repository) -> None:
    """Bring a bare remote, where there is one, to where the work tree is."""
    if git(repository.folder, "remote"):
        git(repository.folder, "push", "-q", "--force", "origin", "main")


async def test_a_new_head_is_read_whole(poller: Poller, repository: Repository, url: str) -> None:
    sha = repository.commit({"web.mill": WEB, "deep/er/api.mill": "# api", "README.md": "no"},
                            "add web\n\nand more")
    publish(repository)
    assert await look(poller, url) == Commit(
        sha, {"deep/er/api.mill": b"# api", "web.mill": WEB.encode()},
        author="Ada <ada@example.com>", subject="add web")


async def test_an_unchanged_head_is_not_read_again(
    poller: Poller, repository: Repository, url: str
) -> None:
    sha = repository.commit({"web.mill": WEB})
    publish(repository)
    assert await look(poller, url, sha) == Unchanged(sha)


async def test_a_rewritten_branch_is_followed(
    poller: Poller, repository: Repository, url: str
) -> None:
    first = repository.commit({"web.mill": WEB})
    repository.commit({"web.mill": "# two"})
    publish(repository)
    git(repository.folder, "reset", "-q", "--hard", first)
    rewritten = repository.commit({"web.mill": "# rewritten"})
    publish(repository)
    found = await look(poller, url, first)
    assert isinstance(found, Commit)
    assert (found.sha, found.files) == (rewritten, {"web.mill": b"# rewritten"})


async def test_a_missing_branch_is_missing(
    poller: Poller, repository: Repository, url: str
) -> None:
    repository.commit({"web.mill": WEB})
    publish(repository)
    assert await look(poller, url, branch="live") == Missing("the repository has no branch live")


async def test_an_empty_repository_has_no_branch(
    poller: Poller, repository: Repository, url: str
) -> None:
    assert await look(poller, url) == Missing("the repository has no branch main")
    assert await look(poller, url, branch="HEAD") == Missing("the repository has no commit yet")


async def test_a_missing_folder_names_the_commit(
    poller: Poller, repository: Repository, url: str
) -> None:
    sha = repository.commit({"deploy/web.mill": WEB})
    publish(repository)
    for path, gone in (("/deploy/prod", "/deploy/prod"), ("/deploy/web.mill", "/deploy/web.mill"),
                       ("/x/y/z", "/x")):
        assert await look(poller, url, path=path) == Missing(
            f"the commit has no folder {gone}", sha)


async def test_only_the_sources_folder_is_read(
    poller: Poller, repository: Repository, url: str
) -> None:
    repository.commit({"deploy/prod/web.mill": WEB, "deploy/test/web.mill": "#", "x.mill": "#"})
    publish(repository)
    found = await look(poller, url, path="/deploy/prod/")
    assert isinstance(found, Commit)
    assert found.files == {"deploy/prod/web.mill": WEB.encode()}


async def test_head_follows_what_is_checked_out(poller: Poller, repository: Repository) -> None:
    first = repository.commit({"web.mill": WEB})
    assert await look(poller, repository.url, first, branch="HEAD") == Unchanged(first)
    git(repository.folder, "checkout", "-q", "-b", "trial")
    second = repository.commit({"web.mill": "# trial"})
    found = await look(poller, repository.url, first, branch="HEAD")
    assert isinstance(found, Commit)
    assert found.sha == second
    assert await look(poller, repository.url, first) == Unchanged(first)


async def test_packed_refs_and_objects_are_read(poller: Poller, repository: Repository) -> None:
    repository.commit({"web.mill": "# one"})
    sha = repository.commit({"web.mill": WEB})
    git(repository.folder, "gc", "-q")
    found = await look(poller, repository.url)
    assert isinstance(found, Commit)
    assert (found.sha, found.files) == (sha, {"web.mill": WEB.encode()})


async def test_an_unchanged_poll_over_http_moves_no_objects(
    poller: Poller, repository: Repository, server: GitServer
) -> None:
    sha = repository.commit({"web.mill": WEB})
    for _ in range(3):
        assert await look(poller, server.url(repository), sha) == Unchanged(sha)
    posts = [line for line in server.requests if line.startswith("POST")]
    gets = [line for line in server.requests if line.startswith("GET")]
    assert (len(gets), len(posts)) == (3, 3)  # capabilities and ls-refs, no fetch


async def test_polls_share_a_child_that_lives_on(poller: Poller, repository: Repository) -> None:
    sha = repository.commit({"web.mill": WEB})
    await look(poller, repository.url, sha)
    before = children()
    assert len(before) == 1
    for _ in range(20):
        assert await look(poller, repository.url, sha) == Unchanged(sha)
    assert children() == before


async def test_large_blobs_beside_the_manifests_are_not_fetched(
    repository: Repository, server: GitServer
) -> None:
    repository.commit({"web.mill": WEB, "film.bin": os.urandom(3 << 20)})
    async with Poller(Bounds(fetched_bytes=1 << 20)) as poller:
        found = await look(poller, server.url(repository))
    assert isinstance(found, Commit)
    assert found.files == {"web.mill": WEB.encode()}


async def test_a_server_that_sends_too_much_is_cut_off(
    repository: Repository, server: GitServer
) -> None:
    git(repository.folder, "config", "uploadpack.allowFilter", "false")
    sha = repository.commit({"web.mill": WEB, "film.bin": os.urandom(3 << 20)})
    async with Poller(Bounds(fetched_bytes=1 << 20)) as poller:
        assert await look(poller, server.url(repository)) == Refused(
            "fetching it takes more than 1 MiB", sha)


async def test_a_server_without_filters_is_read_all_the_same(
    poller: Poller, repository: Repository, server: GitServer
) -> None:
    git(repository.folder, "config", "uploadpack.allowFilter", "false")
    repository.commit({"web.mill": WEB, "film.bin": os.urandom(1 << 20)})
    found = await look(poller, server.url(repository))
    assert isinstance(found, Commit)
    assert found.files == {"web.mill": WEB.encode()}


async def test_credentials_open_a_private_repository(
    poller: Poller, repository: Repository, tmp_path: Path
) -> None:
    sha = repository.commit({"web.mill": WEB})
    private = GitServer(tmp_path, "ada:s3cret")
    try:
        url = private.url(repository)
        where = url.removeprefix("http://").partition("/")[0]
        assert await look(poller, url) == Unreachable(
            f"{where} asks for credentials: name a secret with --secret-ref")
        assert await look(poller, url, credentials=Credentials("ada", "wrong")) == Unreachable(
            f"{where} does not accept the source's credentials")
        found = await look(poller, url, credentials=Credentials("ada", "s3cret"))
        assert isinstance(found, Commit)
        assert found.sha == sha
    finally:
        private.close()


async def test_what_is_not_there_is_unreachable_and_says_the_same_each_time(
    poller: Poller, repository: Repository, server: GitServer, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    base = server.url(repository)
    cases = {
        f"http://127.0.0.1:{port}/app": f"127.0.0.1:{port} refuses the connection",
        "https://nowhere.invalid/app": "the name of nowhere.invalid cannot be resolved",
        base + "-not": f"{base.split('/')[2]} has no git repository there, or hides it from these "
                       "credentials",
        str(tmp_path): f"{tmp_path} is not a git repository",
        str(tmp_path / "gone"): f"{tmp_path / 'gone'} is not a git repository",
    }
    for url, reason in cases.items():
        for _ in range(2):
            assert await look(poller, url) == Unreachable(reason)


async def test_a_dripping_server_ends_at_the_deadline_and_leaves_no_child(
    poller: Poller, dripping: DrippingServer
) -> None:
    found = await look(poller, dripping.url, deadline_s=1.5)
    assert isinstance(found, Unreachable)
    assert "in time" in found.reason
    assert dripping.connected.is_set()
    assert children() == set()


async def test_a_dripping_fetch_ends_at_the_deadline_and_leaves_no_child(
    repository: Repository, server: GitServer
) -> None:
    repository.commit({"web.mill": WEB})
    server.stalls.set()
    async with Poller() as poller:
        found = await look(poller, server.url(repository), deadline_s=2.5)
        assert isinstance(found, Unreachable)
        assert "in time" in found.reason
        assert server.stalled.is_set()
        assert len(children()) == 1  # the one that polls
    assert children() == set()


async def test_a_cancelled_fetch_leaves_no_child(
    repository: Repository, server: GitServer
) -> None:
    repository.commit({"web.mill": WEB})
    server.stalls.set()
    async with Poller() as poller:
        looking = asyncio.create_task(look(poller, server.url(repository)))
        await asyncio.to_thread(server.stalled.wait, 60)
        assert len(children()) == 2
        looking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await looking
        assert len(children()) == 1


async def test_one_hanging_poll_does_not_fail_the_others(
    repository: Repository, dripping: DrippingServer
) -> None:
    sha = repository.commit({"web.mill": WEB})
    async with Poller(Bounds(head_s=2.0)) as poller:
        hanging = asyncio.create_task(look(poller, dripping.url))
        async with asyncio.timeout(60):
            while not hanging.done():
                assert await look(poller, repository.url, sha) == Unchanged(sha)
        assert isinstance(hanging.result(), Unreachable)
        assert await look(poller, repository.url, sha) == Unchanged(sha)


async def test_a_killed_child_is_replaced(poller: Poller, repository: Repository) -> None:
    sha = repository.commit({"web.mill": WEB})
    assert await look(poller, repository.url, sha) == Unchanged(sha)
    (pid,) = children()
    os.kill(pid, signal.SIGKILL)
    for _ in range(2):
        assert await look(poller, repository.url, sha) == Unchanged(sha)


async def test_a_cancelled_poll_leaves_no_child(
    repository: Repository, dripping: DrippingServer
) -> None:
    async with Poller() as poller:
        looking = asyncio.create_task(look(poller, dripping.url))
        await asyncio.to_thread(dripping.connected.wait, 60)
        looking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await looking
    assert children() == set()


async def test_memory_is_bounded(repository: Repository) -> None:
    sha = repository.commit({"web.mill": bytes(256 << 20)})
    async with Poller(Bounds(memory_bytes=256 << 20)) as poller:
        found = await look(poller, repository.url)
        assert found == Refused("reading it takes more than 256 MiB of memory", sha)
        assert await look(poller, repository.url, sha) == Unchanged(sha)
