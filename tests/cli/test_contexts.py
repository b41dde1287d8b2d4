"""Which cluster is spoken to, and the file that holds the tokens."""

from __future__ import annotations

import stat
import tomllib
from concurrent.futures import ThreadPoolExecutor

import pytest

from reconciler.cli import contexts
from reconciler.cli.contexts import Cluster
from reconciler.cli.settings import Settings
from reconciler.edge.certificates import create_ca
from reconciler.errors import MillError, NotFound, Unavailable
from tests.api.cluster import TOKENS
from tests.api.cluster import Cluster as Cluster_
from tests.cli.conftest import Mill

ONE = Cluster(("http://127.0.0.1:4400", "http://127.0.0.1:4410"), "token-one")
TWO = Cluster(("http://127.0.0.1:5400",), "token-two")


def test_file_is_for_its_owner_alone(offline: Mill) -> None:
    contexts.select("one", ONE)
    contexts.select("two", TWO)
    assert stat.S_IMODE(contexts.path().stat().st_mode) == 0o600
    assert stat.S_IMODE(contexts.path().parent.stat().st_mode) == 0o700
    assert tomllib.loads(contexts.path().read_text()) == {
        "current": "two",
        "contexts": {
            "one": {"addresses": list(ONE.addresses), "token": ONE.token},
            "two": {"addresses": list(TWO.addresses), "token": TWO.token},
        },
    }


def test_options_come_before_environment_before_context(
    offline: Mill, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts.select("one", ONE)
    assert contexts.find(Settings()) == ONE
    monkeypatch.setenv("MILL_ADDRESS", "127.0.0.1:6400")
    monkeypatch.setenv("MILL_TOKEN", "token-env")
    assert contexts.find(Settings()) == Cluster(("127.0.0.1:6400",), "token-env")
    given = Settings(address="127.0.0.1:7400,127.0.0.1:7410", token="token-given")
    assert contexts.find(given) == Cluster(("127.0.0.1:7400", "127.0.0.1:7410"), "token-given")
    assert contexts.find(Settings(context="one")) == ONE


def test_token_goes_to_no_other_clusters_address(offline: Mill) -> None:
    contexts.select("one", ONE)
    contexts.select("two", TWO)
    assert contexts.find(Settings(address="10.0.0.1:4400")).token == ""
    assert contexts.find(Settings(address="127.0.0.1:4410")).token == ONE.token


def test_forgotten_context_is_current_no_more(offline: Mill) -> None:
    contexts.select("one", ONE)
    contexts.select("two", TWO)
    contexts.forget("two")
    assert contexts.load() == contexts.Contexts("", {"one": ONE})
    with pytest.raises(Unavailable, match="no cluster"):
        contexts.find(Settings())
    with pytest.raises(NotFound, match="no context two"):
        contexts.find(Settings(context="two"))


def test_two_programs_that_write_at_once_lose_nothing(offline: Mill) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: contexts.select(f"c{n}", TWO), range(24)))
    assert len(contexts.load().clusters) == 24


@pytest.mark.parametrize("text", ["current = [", "[contexts.one]\ntoken = 'x'", "contexts = 3"])
def test_broken_file_is_named(offline: Mill, text: str) -> None:
    contexts.path().parent.mkdir(parents=True)
    contexts.path().write_text(text)
    with pytest.raises(MillError) as caught:
        contexts.load()
    assert caught.value.at == str(contexts.path())


def test_no_cluster_is_exit_code_3_with_what_to_do(offline: Mill) -> None:
    result = offline("status")
    assert (result.code, result.out) == (3, "")
    assert result.err.splitlines()[0].startswith("error: no cluster")
    assert "hint: start one with mill dev" in result.err


CA = create_ca().cert_pem.decode()


def test_context_keeps_the_ca_of_its_cluster(offline: Mill) -> None:
    kept = Cluster(("10.0.0.1:4400", "10.0.0.2:4400"), "token", ca=CA)
    contexts.select("real", kept)
    contexts.select("one", ONE)
    assert contexts.load().clusters == {"real": kept, "one": ONE}
    assert kept.ca_pem() == CA.encode()
    assert ONE.ca_pem() is None
    assert contexts.find(Settings(context="real")) == kept


def test_address_finds_the_ca_that_is_kept_for_it(
    offline: Mill, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts.select("real", Cluster(("10.0.0.1:4400",), "kept", ca=CA))
    monkeypatch.setenv("MILL_CA", "/elsewhere.pem")
    for address in ("10.0.0.1:4400", "https://10.0.0.1:4400/"):
        found = contexts.find(Settings(address=address, token="given"))
        assert (found.token, found.ca) == ("given", CA)
        assert contexts.find(Settings(address=address)).token == "kept"
    other = contexts.find(Settings(address="10.0.0.9:4400", token="given"))
    assert other == Cluster(("10.0.0.9:4400",), "given", "/elsewhere.pem")
    plain = contexts.find(Settings(address="127.0.0.1:4400", token="given"))
    assert plain == Cluster(("127.0.0.1:4400",), "given")


def test_ca_may_be_a_file_and_one_that_is_not_there_is_named(offline: Mill) -> None:
    file = offline.write("ca.pem", CA)
    assert Cluster((), "", ca=str(file)).ca_pem() == CA.encode()
    with pytest.raises(MillError) as caught:
        Cluster((), "", ca="nosuch.pem").ca_pem()
    assert caught.value.at == "nosuch.pem"


async def test_cluster_with_tls_is_asked_by_context_address_and_environment(
    offline: Mill, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Cluster_(tls=True)
    try:
        await made.start(2)
        urls, ca = [node.url for node in made.nodes], made.authority.cert_pem
        reach = ("--address", urls[0], "--token", TOKENS["admin"])
        refused = await offline.beside(*reach, "nodes")
        assert (refused.code, refused.out) == (3, "")
        assert "is not trusted" in refused.err
        assert "hint: is it a node of this cluster? name the cluster's CA" in refused.err
        monkeypatch.setenv("MILL_CA", str(offline.write("ca.pem", ca.decode())))
        assert (await offline.beside(*reach, "nodes")).code == 0
        monkeypatch.delenv("MILL_CA")
        contexts.select("real", Cluster(tuple(urls), TOKENS["admin"], ca=ca.decode()))
        assert (await offline.beside("nodes")).code == 0
        assert (await offline.beside("--address", urls[1], "nodes")).code == 0
        await made.nodes[1].server.stop()
        contexts.select("real", Cluster(tuple(reversed(urls)), TOKENS["admin"], ca=ca.decode()))
        assert (await offline.beside("nodes")).code == 0
        offline.write("junk.pem", "-----BEGIN CERTIFICATE-----")
        monkeypatch.setenv("MILL_CA", "junk.pem")
        contexts.forget("real")
        junk = await offline.beside(*reach, "nodes")
        assert (junk.code, "no certificate in PEM" in junk.err) == (2, True)
    finally:
        await made.stop()
