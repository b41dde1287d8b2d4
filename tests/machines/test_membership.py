"""Machines come and go: voters and learners, leaving without a trace, a lost majority or log."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.seed import SEED
from tests.machines.cluster import Machines
from tests.machines.test_three_machines import three

pytestmark = [pytest.mark.containers, pytest.mark.timeout(500)]
Form = Callable[[int], Machines]
PLAIN = SEED.replace("${secret(db.url)}", "x")
SMALL = PLAIN.replace("cpu = 0.5", "cpu = 0.1").replace("cpu = 1", "cpu = 0.1")


def test_one_becomes_three_and_five_and_the_sixth_follows_and_serves_the_same(form: Form) -> None:
    here = form(6)
    here.init(1)
    token = here.json(1, "token", "create", "--join", "--uses", "5")["token"]
    for number, voters in ((2, 1), (3, 3), (4, 3), (5, 5), (6, 5)):
        here.join(number, via=number - 1, token=token)
        everyone = set(range(1, number + 1))
        here.until(lambda e=everyone, v=voters: here.ready(e, voters=v))  # type: ignore[misc]  # mypy does not infer a lambda's default
    rows = here.nodes(6)
    (learner,) = [int(name[-1]) for name, row in rows.items() if not row["voter"]]
    spread = PLAIN.replace("replicas = 2; cpu = 0.5", "replicas = 6; cpu = 0.1")
    done = here.deploy(learner, spread)
    assert done.returncode == 0, done.stdout + done.stderr
    allocs = here.allocations(learner)
    (own,) = [a for a, row in allocs.items()
              if row["service"] == "web" and row["node"] == f"node-{learner}"]
    assert len(here.answering(learner, requests=90)) == 6
    vip = here.inside(learner, own, ["dig", "+short", f"@10.77.{learner}.1", "web.mill"])
    assert "service=web" in here.inside(
        learner, own, ["curl", "-s", "-m", "10", f"http://{vip}:3000/"])


def test_a_token_is_good_for_its_uses_and_not_once_revoked(form: Form) -> None:
    here = form(2)
    here.init(1)
    token = here.json(1, "token", "create", "--join")
    here.mill(1, "token", "revoke", token["id"])
    address = here.lab.machine(1).address
    refused = here.call(2, "join", address, "--token", token["token"], "--data",
                        str(here.data(2)), "--name", "node-2",
                        "--advertise", here.lab.machine(2).address)
    assert refused.returncode == 4, refused.stderr
    assert "token" in refused.stderr
    assert not here.place(2).config_path.exists()
    here.join(2)
    here.until(lambda: here.ready({1, 2}, voters=1))
    again = here.json(1, "token", "create", "--join")["token"]
    mangled = here.call(2, "join", address, "--token", again[:-3], "--data", str(here.data(3)),
                        "--name", "node-3", "--advertise", here.lab.machine(2).address)
    assert mangled.returncode == 2, mangled.stderr


def test_the_leader_leaves_under_load_and_nothing_of_it_stays(form: Form) -> None:
    here = three(form)
    assert here.deploy(1, PLAIN).returncode == 0
    leader = here.leader()
    asked = leader % 3 + 1
    tag = here.place(leader).tag
    url = f"http://{here.lab.machine(asked).address}/"
    load = here.lab.spawn(asked, [
        "bash", "-c", "while true; do curl -s -m 10 -o /dev/null -w '%{http_code}\\n' "
        f"-H 'Host: app.example.com' {url}; done"], here.folder / "load.log")
    here.mill(leader, "leave", "--data", str(here.data(leader)), timeout_s=300)
    load.send_signal(signal.SIGTERM)
    codes = (here.folder / "load.log").read_text().split()
    assert len(codes) > 20
    assert set(codes) == {"200"}
    here.agents.pop(leader).wait(30)
    rest = {1, 2, 3} - {leader}
    here.until(lambda: here.ready(rest, voters=1, asked=asked))
    assert len({a["service"] for a in here.allocations(asked).values()
                if a["status"] == "healthy"}) == 2
    _nothing_of(tag, here, leader)
    here.join(leader, via=asked)
    here.until(lambda: here.ready({1, 2, 3}, voters=3, asked=asked))


def _nothing_of(tag: str, here: Machines, number: int) -> None:
    assert not here.data(number).exists()
    assert not Path(f"/run/mill-{tag}").exists()
    assert not list(Path("/run/netns").glob(f"mill-{tag}-*"))
    assert not list(Path("/sys/fs/cgroup").glob(f"*/mill-{tag}"))
    links = here.lab.run(number, ["ip", "-br", "link"]).stdout
    assert sorted(line.split("@")[0].split()[0] for line in links.splitlines()) == ["eth0", "lo"]
    assert here.lab.run(number, ["nft", "list", "tables"]).stdout.strip() == ""
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in shown.splitlines() if f"mill-{tag}" in line
                or str(here.data(number)) in line]


def test_a_lost_majority_is_brought_back_by_one_node_that_is_left(form: Form) -> None:
    here = three(form)
    assert here.deploy(1, SMALL).returncode == 0
    here.mill(1, "secret", "set", "kept", "value")
    left = 3
    for number in (1, 2):
        here.kill(number)
        here.lab.isolate(number)
    here.until(lambda: here.call(left, "secret", "set", "more", "x").returncode == 3)
    here.signal(left, signal.SIGTERM)
    here.agents.pop(left).wait(60)
    data = str(here.data(left))
    wrong = here.call(left, "agent", "--recover", "--data", data, typed="yes\n")
    assert wrong.returncode == 6
    assert "node-3" in wrong.stderr
    _recover(here, left)
    assert here.mill(left, "secret", "get", "kept").strip() == "value"
    here.until(lambda: here.nodes(left)["node-1"]["status"] == "down")
    here.until(lambda: {a["node"] for a in here.allocations(left).values()
                        if a["status"] == "healthy"} == {"node-3"})
    assert here.deploy(left, SMALL.replace("web:v1", "web:v2")).returncode == 0
    here.lab.heal()
    for number in (1, 2):
        here.mill(left, "remove", f"node-{number}")
        here.mill(number, "leave", "--force", "--yes", "--data", str(here.data(number)))
        here.join(number, via=left)
    here.until(lambda: here.ready({1, 2, 3}, voters=3, asked=left))
    assert here.mill(1, "secret", "get", "kept").strip() == "value"


def _recover(here: Machines, number: int) -> None:
    """`mill agent --recover`, confirmed on its standard input, goes on as the agent."""
    typed = here.folder / "typed"
    typed.write_text(f"node-{number}\n")
    script = " ".join(["exec", *here.argv("agent", "--recover", "--data", str(here.data(number))),
                       f"< {typed}"])
    log = here.folder / f"agent-{number}.log"
    here.agents[number] = here.lab.spawn(
        number, [*here.env(number), "bash", "-c", script], log)
    here.until(lambda: here.leader(number) == number)


def test_a_damaged_log_is_refused_with_its_place_and_comes_back_from_the_peers(form: Form) -> None:
    here = three(form)
    here.mill(1, "secret", "set", "kept", "value")
    follower, asked = 1, 2  # the founder, whose settings name nobody else
    here.signal(follower, signal.SIGTERM)
    here.agents.pop(follower).wait(60)
    journal = here.data(follower) / "log" / "journal"
    whole = bytearray(journal.read_bytes())
    whole[300] ^= 0xFF
    journal.write_bytes(whole)
    here.agent(follower)
    assert here.agents.pop(follower).wait(60) == 1
    assert f"{journal}, byte " in here.said(follower)
    assert "--rejoin" in here.said(follower)
    here.agent(follower, "--rejoin")
    here.until(lambda: here.mill(follower, "secret", "get", "kept").strip() == "value")
    here.until(lambda: here.ready({1, 2, 3}, voters=3, asked=asked))
