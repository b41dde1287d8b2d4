"""Three machines whose cables are cut, whose leader sleeps or dies, while people and services work.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.machines.cluster import Machines
from tests.machines.test_by_hand import PLAIN
from tests.machines.test_three_machines import three

pytestmark = [pytest.mark.containers, pytest.mark.timeout(400)]
Form = Callable[[int], Machines]
EACH = PLAIN.replace("replicas = 2", "replicas = 3")
WRITES = "i=0; while true; do i=$((i+1)); {mill} secret set w$i x >/dev/null 2>&1; echo $?; done"


def test_the_leader_is_cut_off_and_each_side_does_what_it_may(form: Form) -> None:
    here = three(form)
    assert here.deploy(1, EACH).returncode == 0
    old = here.leader()
    other = old % 3 + 1
    own = {number: next(a for a, row in here.allocations().items()
                        if row["node"] == f"node-{number}") for number in (old, other)}
    here.lab.isolate(old)
    here.until(lambda: here.leader(other) not in (0, old))
    here.mill(other, "secret", "set", "new", "side")
    _the_old_side_knows_that_it_is_alone(here, old)
    for number in (old, other):
        assert here.answering(number, requests=10)
        assert here.inside(
            number, own[number], ["dig", "+short", f"@10.77.{number}.1", "web.mill"])
    term = here.json(other, "status")["term"]
    here.lab.heal()
    here.until(lambda: here.ready({1, 2, 3}, voters=3, asked=other))
    assert here.json(other, "status")["term"] == term
    assert here.mill(old, "secret", "get", "new").strip() == "side"
    _one_way(here)
    _the_leader_sleeps(here)


def _the_old_side_knows_that_it_is_alone(here: Machines, old: int) -> None:
    for words in (("secret", "set", "old", "side"), ("secret", "list"), ("scale", "web=1")):
        done = here.call(old, *words)
        assert done.returncode == 3, (words, done.stdout, done.stderr)
        assert "hint: " in done.stderr
    assert asked(here, old, "/v1/services")[1] == 503
    assert asked(here, old, "/v1/secrets/x", "-X", "PUT", "-d", '{"value":"y"}')[1] == 503
    told, code = asked(here, old, "/v1/services?stale=ok")
    assert (code, told["stale"]) == (200, True)
    assert len(told["services"]) == 2
    looked = here.call(old, "status")
    assert looked.returncode == 0
    assert "warning" in looked.stdout + looked.stderr


def asked(here: Machines, number: int, path: str, *more: str) -> tuple[Any, int]:
    """What the API of a machine's own node answers, and its status."""
    from reconciler.api.local_token import local_token

    token = local_token((here.data(number) / "cluster.key").read_bytes())
    body, _, code = here.curl(
        number, f"http://127.0.0.1:4400{path}", "-H", f"Authorization: Bearer {token}", *more,
    ).rpartition(" ")
    return json.loads(body or "null"), int(code)


def _one_way(here: Machines) -> None:
    """The leader is heard by nobody, but hears: another leads, and it does not come between."""
    old = here.leader(1) or here.leader(2)
    others = {1, 2, 3} - {old}
    for number in others:
        here.lab.one_way(old, number)
    some = min(others)
    here.until(lambda: here.leader(some) in others)
    here.mill(some, "secret", "set", "one", "way")
    here.lab.heal()
    here.until(lambda: here.ready({1, 2, 3}, voters=3, asked=some))


def _the_leader_sleeps(here: Machines) -> None:
    """SIGSTOP; another leads and removes a service; what wakes must not bring it back."""
    old = here.leader()
    other = old % 3 + 1
    here.signal(old, signal.SIGSTOP)
    here.until(lambda: here.leader(other) not in (0, old))
    term = here.json(other, "status")["term"]
    here.mill(other, "secret", "set", "asleep", "no")
    here.signal(old, signal.SIGCONT)
    here.until(lambda: here.ready({1, 2, 3}, voters=3, asked=other))
    assert here.json(other, "status")["term"] == term
    assert here.mill(old, "secret", "get", "asleep").strip() == "no"
    here.until(lambda: len(here.answering(old, requests=40)) == 3)


def test_a_deploy_ends_whole_or_undone_whatever_happens_to_its_leader(form: Form) -> None:
    here = three(form)
    assert here.deploy(1, EACH).returncode == 0
    old = here.leader()
    other = old % 3 + 1
    path = here.folder / "next.mill"
    path.write_text(EACH.replace("web:v1", "web:v2").replace("REG", here.registry))
    running = _deploying(here, other, path)
    here.kill(old)
    assert running.wait(120) == 0, (here.folder / "deploy.log").read_text()
    here.agent(old)
    here.until(lambda: here.ready({1, 2, 3}, voters=3, asked=other))
    _one_revision(here, other, "web:v2")
    old = here.leader()
    other = old % 3 + 1
    path.write_text(EACH.replace("REG", here.registry))
    running = _deploying(here, other, path)
    here.lab.isolate(old)
    code = running.wait(45)  # not the minute after which a silent stream is given up
    here.lab.heal()
    here.until(lambda: here.ready({1, 2, 3}, voters=3, asked=other))
    _one_revision(here, other, "web:v1" if code == 0 else "web:v2")
    assert here.json(other, "deploys")["deploys"][0]["outcome"] in ("deployed", "rolled_back")


def _deploying(here: Machines, number: int, path: Path) -> subprocess.Popen[bytes]:
    """A deploy that has scheduled its first allocation."""
    log = here.folder / "deploy.log"
    log.unlink(missing_ok=True)
    running = here.lab.spawn(
        number, [*here.env(number), *here.argv("deploy", "-f", str(path))], log)
    here.until(lambda: "scheduled" in log.read_text())
    return running


def _one_revision(here: Machines, asked_: int, image: str) -> None:
    """All replicas are of one revision, and serve on every machine."""
    def whole() -> bool:
        rows = {r["name"]: r for r in here.json(asked_, "services")["services"]}
        live = [a for a in rows["web"]["allocations"] if a["status"] == "healthy"]
        return (rows["web"]["image"].partition("@")[0].endswith(image) and len(live) == 3
                and {a["revision"] for a in live} == {rows["web"]["revision"]})

    here.until(whole)
    for number in (1, 2, 3):
        here.until(lambda n=number: len(here.answering(n)) == 3)  # type: ignore[misc]  # mypy does not infer a lambda's default


def test_the_leader_is_drained_while_people_write_and_no_write_fails(form: Form) -> None:
    here = three(form)
    assert here.deploy(1, PLAIN).returncode == 0
    old = here.leader()
    other = old % 3 + 1
    log = here.folder / "writes.log"
    mill = " ".join(here.argv())
    writers = [here.lab.spawn(n, [*here.env(n), "bash", "-c", WRITES.format(mill=mill)], log)
               for n in (old, other)]
    here.until(lambda: log.exists() and len(log.read_text().split()) > 4)
    said = here.mill(other, "drain", f"node-{old}")
    assert "drained" in said
    before = len(log.read_text().split())
    here.until(lambda: len(log.read_text().split()) > before + 4)
    for writer in writers:
        writer.terminate()
        writer.wait(30)
    assert set(log.read_text().split()) == {"0"}
    rows = here.nodes(other)
    assert rows[f"node-{old}"]["status"] == "draining"
    assert not rows[f"node-{old}"]["leader"]
    here.mill(other, "undrain", f"node-{old}")
    here.until(lambda: here.ready({1, 2, 3}, voters=3, asked=other))
    _what_does_not_fit_stays(here, other)


def _what_does_not_fit_stays(here: Machines, asked_: int) -> None:
    """One replica on each of three, too large for two on one: a drain says so and goes on."""
    large = PLAIN.replace("replicas = 2", "replicas = 3").replace("cpu = 0.1", "cpu = 1.2", 1)
    done = here.deploy(asked_, large)
    assert done.returncode == 0, done.stdout + done.stderr
    name = f"node-{asked_ % 3 + 1}"
    drained = here.call(asked_, "drain", name, "--timeout", "3s")
    assert drained.returncode == 1, drained.stdout + drained.stderr
    assert "warning" in drained.stdout
    assert "not drained" in drained.stdout
    assert here.nodes(asked_)[name]["status"] == "draining"
    assert here.call(asked_, "remove", name).returncode == 6
    here.mill(asked_, "undrain", name)
    assert here.nodes(asked_)[name]["status"] == "ready"
    left = here.call(asked_ % 3 + 1, "leave", "--timeout", "2s", "--data",
                     str(here.data(asked_ % 3 + 1)))
    assert left.returncode == 6
    assert "undrain" in left.stderr
