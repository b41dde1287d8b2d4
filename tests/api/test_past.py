"""`?at=INDEX`: the cluster as it was, as far back as the log is held."""

from __future__ import annotations

import httpx

from reconciler.fsm.codec import Entry, encode_entry
from reconciler.fsm.commands import SetSecret, Trim
from tests.api.cluster import Cluster, deployed


async def test_status_of_each_index_is_what_was_answered_then(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    seen = {}
    for line in ("service web", "service api", "service web\nservice api"):
        await deployed(cluster, line)
        answer = (await api.get("/v1/status")).json()
        seen[answer["index"]] = answer
    assert len(seen) == 3
    for index, then in seen.items():
        past = (await api.get(f"/v1/status?at={index}")).json()
        assert past["index"] == index
        assert past["services"] == then["services"]
        assert [n["allocations"] for n in past["nodes"]] \
            == [n["allocations"] for n in then["nodes"]]
        assert past["leader"] is None
        assert past["at"] == "2023-11-14T22:13:20.000Z"
        assert "at" not in then
    assert [s["name"] for s in (await api.get("/v1/status?at=1")).json()["services"]] == []


async def test_a_deploy_that_ran_then_is_shown_running(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    deploy = await deployed(cluster, "service web")
    begun = int(deploy.removeprefix("d-"))
    past = (await api.get(f"/v1/status?at={begun}")).json()
    assert past["deploy"]["id"] == deploy
    assert past["deploy"]["outcome"] == "running"


async def test_what_is_not_held_is_404_and_names_the_oldest(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    await deployed(cluster, "service web")
    cluster.log.forget()
    oldest = len(cluster.log.entries)
    answer = await api.get(f"/v1/status?at={oldest - 1}")
    assert answer.status_code == 404
    assert str(oldest) in answer.json()["detail"]
    assert (await api.get(f"/v1/status?at={oldest}")).json()["index"] == oldest


async def test_the_future_and_what_is_no_index_are_422(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    for text in (len(cluster.log.entries) + 1, 10**17, 0, -1, "x", 10**30):
        answer = await api.get("/v1/status", params={"at": str(text)})
        assert answer.status_code == 422, text


async def test_a_follower_has_the_leader_answer_or_answers_itself_when_that_is_enough(
    pair: Cluster
) -> None:
    await deployed(pair, "service web")
    index = pair.nodes[0].state.index
    follower = pair.client(node=1)
    assert (await follower.get(f"/v1/status?at={index}")).json()["node"] == "node-1"
    stale = (await follower.get(f"/v1/status?at={index}&stale=ok")).json()
    assert (stale["node"], stale["stale"], stale["index"]) == ("node-2", True, index)


async def test_events_that_the_state_forgot_come_from_the_log(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    log, ledger = cluster.log, cluster.nodes[0].ledger
    first = len(log.entries)
    for number in range(10_500):  # not one at a time over HTTP: this is the log's past
        command = SetSecret(f"s{number % 7}", b"n" * 12, b"%d" % number)
        log.append(encode_entry(Entry(1, command)))
    cluster.clock.advance(48 * 3600)
    await ledger.propose(Trim(cluster.clock.wall_ms()))
    state = cluster.nodes[0].state
    oldest = state.events[0][0].index
    assert oldest > first + 100
    rows = (await api.get(f"/v1/events?after={first}&limit=10000")).json()["events"]
    assert [row["index"] for row in rows] == list(range(first + 1, first + 10_001))
    rest = (await api.get(f"/v1/events?after={rows[-1]['index']}&limit=10000")).json()["events"]
    assert [row["index"] for row in rest] == list(range(first + 10_001, first + 10_501))
    log.forget()
    kept = (await api.get(f"/v1/events?after={first + 1}&limit=5")).json()["events"]
    assert kept[0]["index"] == oldest
