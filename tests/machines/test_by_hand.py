"""Machines as anybody makes them: `ip netns add`, a cable, no route to the outside, one home.

What goes wrong while a cluster is formed by hand, each with its exit code, its reason and what to
do about it; then a power cut, and a removal that the removed node was not told of.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.end_to_end.seed import SEED
from tests.machines.cluster import Machines, command_of

pytestmark = [pytest.mark.containers, pytest.mark.timeout(400)]
Form = Callable[[int], Machines]
PLAIN = SEED.replace("${secret(db.url)}", "x").replace("cpu = 0.5", "cpu = 0.1").replace(
    "cpu = 1", "cpu = 0.1")


def plain(form: Form, count: int) -> Machines:
    """Machines without a default route, whose loopback is down."""
    here = form(count)
    here.by_hand = True
    for number in range(1, count + 1):
        here.lab.run(number, ["ip", "route", "del", "default"])
        here.lab.run(number, ["ip", "link", "set", "lo", "down"])
    return here


def refused(here: Machines, number: int, code: int, *words: str) -> str:
    """What `mill WORDS` said on standard error when it ended with that code."""
    done = here.call(number, *words)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert "\nhint: " in done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_cluster_is_formed_by_hand_and_every_mistake_is_told(form: Form) -> None:
    here = plain(form, 3)
    one, two = here.lab.machine(1).address, here.lab.machine(2).address
    data = {n: ("--data", str(here.data(n))) for n in (1, 2, 3)}
    assert "mill init" in refused(here, 1, 5, "agent", *data[1])
    refused(here, 1, 3, "status")
    here.made |= {1, 2, 3}
    here.mill(1, "init", *data[1], "--name", "node-1")  # its only address is the one it advertises
    assert "mill leave" in refused(here, 1, 6, "init", *data[1])
    assert one in refused(here, 1, 3, "status")
    here.agent(1)
    here.until(lambda: here.call(1, "status").returncode == 0)
    _one_agent_a_folder(here)
    token = here.json(1, "token", "create", "--join", "--uses", "1")["token"]
    assert "--name" in refused(here, 2, 6, "join", one, "--token", token, *data[2],
                               "--name", "node-1")
    assert two in refused(here, 2, 3, "join", two, "--token", token, *data[2], "--name", "node-2")
    assert "4402" in refused(here, 2, 3, "join", f"{one}:4402", "--token", token, *data[2],
                             "--name", "node-2")
    here.mill(2, "join", f"https://{one}:4400/", "--token", token, *data[2], "--name", "node-2")
    assert "spent" in refused(here, 3, 4, "join", one, "--token", token, *data[3],
                              "--name", "node-3")
    refused(here, 2, 6, "join", one, "--token", token, *data[2], "--name", "node-2")
    refused(here, 2, 6, "init", *data[2])
    here.agent(2)
    other = _joined_elsewhere(here, token)
    here.mill(3, "join", two, "--token", other, *data[3], "--name", "node-3")
    here.agent(3)
    here.until(lambda: here.ready({1, 2, 3}, voters=3))
    _the_door_of_the_api(here)


def _one_agent_a_folder(here: Machines) -> None:
    pid = here.pid(1)
    again = here.call(1, "agent", "--data", str(here.data(1)))
    assert again.returncode == 6
    assert "runs on" in again.stderr
    assert here.pid(1) == pid


def _joined_elsewhere(here: Machines, spent: str) -> str:
    """Tokens that do not let machine 3 in: short-lived, revoked, changed; then one that does."""
    one, three = here.lab.machine(1).address, ("--data", str(here.data(3)), "--name", "node-3")
    brief = here.json(1, "token", "create", "--join", "--expires", "1s")["token"]
    revoked = here.json(1, "token", "create", "--join")
    here.mill(1, "token", "revoke", revoked["id"])
    assert "revoked" in refused(here, 3, 4, "join", one, "--token", revoked["token"], *three)
    here.until(lambda: "expired" in here.call(3, "join", one, "--token", brief, *three).stderr)
    changed = spent[:30] + ("A" if spent[30] != "A" else "B") + spent[31:]
    refused(here, 3, 2, "join", one, "--token", changed, *three)
    refused(here, 3, 2, "join", one, *three)
    assert not here.place(3).config_path.exists()
    return str(here.json(2, "token", "create", "--join")["token"])


def _the_door_of_the_api(here: Machines) -> None:
    one = here.lab.machine(1).address
    ca = ("--cacert", str(here.data(3) / "identity" / "ca.pem"))
    assert here.curl(3, f"https://{one}:4400/healthz", *ca).endswith(" 200")
    assert here.curl(3, f"https://{one}:4400/readyz", "-k").endswith(" 200")
    assert here.curl(3, f"https://{one}:4400/v1/nodes", *ca).endswith(" 401")
    assert here.curl(3, f"https://{one}:4400/healthz").endswith(" 000")  # a CA that it has not
    assert "node-3" in here.mill(2, "status", "--address", f"https://{one}:4400")


def test_a_machine_that_lost_its_power_and_one_that_was_given_up_meanwhile(form: Form) -> None:
    here = plain(form, 3)
    here.init(1)
    here.join(2)
    here.join(3)
    here.until(lambda: here.ready({1, 2, 3}, voters=3))
    text = PLAIN.replace("replicas = 2", "replicas = 3")
    assert here.deploy(2, text).returncode == 0
    before = here.allocations(2)
    here.reboot(1)
    here.agent(1)
    here.until(lambda: here.ready({1, 2, 3}, voters=3, asked=2))
    here.until(lambda: len(here.answering(1)) == 3)
    after = here.allocations(2)
    assert {a["node"] for a in after.values() if a["service"] == "web"} \
        == {a["node"] for a in before.values() if a["service"] == "web"}
    refusal = refused(here, 1, 6, "remove", "node-3")
    assert "drain" in refusal
    _given_up_while_off(here, 3)


def _given_up_while_off(here: Machines, number: int) -> None:
    """SIGKILL of its agent leaves its containers; removed then, it must find out, and end them."""
    name, data = f"node-{number}", ("--data", str(here.data(number)))
    here.kill(number)
    here.lab.isolate(number)
    here.until(lambda: here.nodes(1)[name]["status"] == "down")
    here.until(lambda: all(a["node"] != name for a in here.allocations(1).values()))
    here.mill(1, "remove", name)
    here.lab.heal()
    here.agent(number)
    assert here.agents.pop(number).wait(60) == 0
    said = here.said(number)
    assert "event=removed" in said
    assert "mill leave" in said
    assert not [p for p in here.processes(number) if "containerd" not in command_of(p)]
    here.agent(number)
    assert here.agents.pop(number).wait(30) == 1
    assert "was removed from" in here.said(number)
    here.mill(number, "leave", *data)
    assert not here.data(number).exists()
    assert here.processes(number) == []
    here.until(lambda: here.ready({1, 2}, voters=1))
