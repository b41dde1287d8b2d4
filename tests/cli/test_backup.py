"""`mill backup`, `mill restore`, `mill status --at`, as a person calls them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from tests.api.cluster import Cluster, deployed
from tests.cli.conftest import Mill

PASSPHRASE = b"correct horse battery\n"


@pytest.fixture
async def empty() -> AsyncIterator[Cluster]:
    made = Cluster()
    try:
        await made.start(1)
        yield made
    finally:
        await made.stop()


async def test_a_backup_is_written_and_restored_elsewhere(
    mill: Mill, cluster: Cluster, empty: Cluster
) -> None:
    await mill.beside("secret", "set", "db", "hunter2")
    await deployed(cluster, "service web db")
    index = cluster.nodes[0].state.index
    made = await mill.beside("backup", "b.mill-backup", "--passphrase-file", "-", stdin=PASSPHRASE)
    file = mill.folder / "b.mill-backup"
    assert made.code == 0, made.err
    assert made.out.startswith(f"  mill-test at index {index}: b.mill-backup (")
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in mill.folder.iterdir()] == ["b.mill-backup"]
    again = await mill.beside("restore", str(file), "--passphrase-file", "-", stdin=PASSPHRASE)
    assert again.code == 6
    assert "service web" in again.err
    mill.address = empty.nodes[0].url
    mill.write("pass", PASSPHRASE.decode())
    done = await mill.beside("restore", str(file), "--passphrase-file", "pass")
    assert done.code == 0, done.err
    assert done.out == f"  mill-test restored as of index {index}, 2023-11-14T22:13:20.000Z: " \
                       "1 service, 1 secret, 0 sources\n"
    assert (await mill.beside("secret", "get", "db")).out == "hunter2\n"


async def test_json_says_where_and_what(mill: Mill, cluster: Cluster) -> None:
    made = await mill.beside("backup", "b", "--json", "--passphrase-file", "-", stdin=PASSPHRASE)
    told = json.loads(made.out)
    assert told == {"file": "b", "bytes": (mill.folder / "b").stat().st_size,
                    "cluster": "mill-test", "index": cluster.nodes[0].state.index}


async def test_an_older_backup_is_replaced_and_nothing_else(mill: Mill, cluster: Cluster) -> None:
    mill.write("web.mill", "service")
    refused = await mill.beside("backup", "web.mill", "--passphrase-file", "-", stdin=PASSPHRASE)
    assert refused.code == 6
    assert (mill.folder / "web.mill").read_text() == "service"
    for _ in range(2):
        made = await mill.beside("backup", "b", "--passphrase-file", "-", stdin=PASSPHRASE)
        assert made.code == 0


async def test_mistakes_say_what_to_do_and_leave_no_file(mill: Mill, cluster: Cluster) -> None:
    mill.write("notes", "no backup")
    for arguments, stdin, code, said in (
        (("backup", "b"), b"", 2, "nobody to ask"),
        (("backup", "b", "--passphrase-file", "-"), b"short\n", 2, "from 12"),
        (("backup", "b", "--passphrase-file", "nowhere"), b"", 5, "nowhere"),
        (("backup", "no/where/b", "--passphrase-file", "-"), PASSPHRASE, 2, "no/where/b"),
        (("restore", "nowhere"), b"", 5, "nowhere"),
        (("restore", "notes", "--passphrase-file", "-"), PASSPHRASE, 2, "no backup"),
    ):
        result = await mill.beside(*arguments, stdin=stdin)
        assert (result.code, said in result.err) == (code, True), (arguments, result.err)
    assert [path.name for path in mill.folder.iterdir()] == ["notes"]


async def test_status_at_an_index_is_what_was_there(mill: Mill, cluster: Cluster) -> None:
    await deployed(cluster, "service web")
    index = cluster.nodes[0].state.index
    await deployed(cluster, "service api")
    past = await mill.beside("status", "--at", str(index))
    assert past.code == 0, past.err
    assert past.lines[0] == f"mill-test: 1 node, as of 2023-11-14T22:13:20.000Z, index {index}"
    assert "web" in past.out
    assert "api" not in past.out
    assert json.loads((await mill.beside("status", "--at", "1", "--json")).out)["services"] == []
    assert (await mill.beside("status", "--at", "99999")).code == 2
    cluster.log.forget()
    gone = await mill.beside("status", "--at", str(index - 1))
    assert gone.code == 5
    assert "oldest" in gone.err
