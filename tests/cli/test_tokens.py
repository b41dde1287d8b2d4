"""`mill token`, as a person and a program call it."""

from __future__ import annotations

import json
import re

import pytest

from reconciler.api.join_token import parse_join_token
from tests.api.cluster import Cluster
from tests.cli.conftest import Mill, Result


async def as_holder(mill: Mill, token: str, *arguments: str) -> Result:
    return await mill.beside("--token", token, *arguments)


async def test_token_is_shown_once_on_a_line_of_its_own(mill: Mill, cluster: Cluster) -> None:
    made = await mill.beside("token", "create", "--role", "deploy", "--service", "web",
                             "--service", "api", "--expires", "30d")
    assert (made.code, made.err) == (0, "")
    said, token = made.lines
    assert re.fullmatch(r"  t-[a-z2-7]{8}: role deploy for api, web "
                        r"until 2023-12-14T22:13:20\.000Z, shown this once", said)
    assert (await as_holder(mill, token, "services")).code == 0
    refused = await as_holder(mill, token, "secret", "list")
    assert refused.code == 0  # names alone
    for command in (("token", "list"), ("drain", "node-1"), ("secret", "get", "x"),
                    ("restart", "other")):
        refused = await as_holder(mill, token, *command)
        assert (refused.code, refused.out) == (4, "")
    assert "it is for api, web" in refused.err


async def test_quiet_is_the_token_alone_and_json_the_contract(mill: Mill, cluster: Cluster) -> None:
    quiet = await mill.beside("-q", "token", "create", "--role", "read")
    assert quiet.code == 0
    assert (await as_holder(mill, quiet.out.strip(), "status")).code == 0
    made = await mill.beside("token", "create", "--role", "admin", "--json")
    found = json.loads(made.out)
    assert {"id", "token", "role", "services"} <= set(found)
    assert (found["role"], found["services"]) == ("admin", [])


async def test_join_token_comes_as_the_command_to_type(mill: Mill, cluster: Cluster) -> None:
    made = await mill.beside("token", "create", "--join", "--uses", "2", "--expires", "30m")
    assert made.code == 0, made.err
    said, command = made.lines
    assert re.fullmatch(r"  t-[a-z2-7]{8}: lets 2 machines in until 2023-11-14T22:43:20\.000Z, "
                        r"shown this once", said)
    mill_, join, address, flag, token = command.split(" ")
    assert (mill_, join, flag) == ("mill", "join", "--token")
    assert parse_join_token(token).address == address
    one = await mill.beside("token", "create", "--join", "--json")
    found = json.loads(one.out)
    assert (found["role"], found["uses"]) == ("join", 1)
    assert found["expires_at"] == "2023-11-14T23:13:20.000Z"


async def test_list_and_revoke(mill: Mill, cluster: Cluster) -> None:
    token = json.loads((await mill.beside("token", "create", "--role", "read", "--json")).out)
    await mill.beside("token", "create", "--join", "--uses", "3")
    listed = await mill.beside("token", "list")
    heads, *rows = listed.lines
    assert heads.split() == ["ID", "ROLE", "SERVICES", "CREATED", "USED", "EXPIRES"]
    cells = {row.split()[0]: row.split() for row in rows}
    assert cells["t-admin"][1:3] == ["admin", "-"]
    assert cells[token["id"]][1] == "read"
    assert [row[4:] for row in cells.values() if row[1] == "join"] \
        == [["0/3", "2023-11-14T23:13:20.000Z"]]
    assert token["token"] not in listed.out
    quiet = await mill.beside("token", "list", "-q")
    assert set(quiet.lines) == set(cells)
    gone = await mill.beside("token", "revoke", token["id"])
    assert (gone.code, gone.out) == (0, f"  {token['id']}: revoked\n")
    assert (await as_holder(mill, token["token"], "status")).code == 4
    again = await mill.beside("token", "revoke", token["id"])
    assert (again.code, again.out) == (5, "")
    last = await mill.beside("token", "revoke", "t-admin")
    assert last.code == 6
    assert "last admin token" in last.err


@pytest.mark.parametrize("arguments", [
    ("create",), ("create", "--role", "root"), ("create", "--join", "--role", "read"),
    ("create", "--join", "--service", "web"), ("create", "--role", "read", "--uses", "2"),
    ("create", "--join", "--uses", "0"), ("revoke",),
])
def test_wrong_call_is_exit_code_2(offline: Mill, arguments: tuple[str, ...]) -> None:
    result = offline("token", *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")


async def test_what_the_cluster_finds_wrong_is_exit_code_2(mill: Mill, cluster: Cluster) -> None:
    for arguments in (("--role", "read", "--service", "web"), ("--join", "--expires", "soon"),
                      ("--join", "--uses", "999")):
        result = await mill.beside("token", "create", *arguments)
        assert (result.code, result.out) == (2, "")
        assert "hint: " in result.err
