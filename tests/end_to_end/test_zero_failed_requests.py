"""Updates and broken updates under load: not one request fails."""

from __future__ import annotations

import pytest

from tests.end_to_end.conftest import Cluster
from tests.end_to_end.load import load

pytestmark = [pytest.mark.containers, pytest.mark.timeout(600)]

ROUNDS = 20


def manifest(tag: str, round_: int, extra: str = "") -> str:
    return f'''
service "web" {{
  image = "REG/web:{tag}"
  port = 3000; replicas = 2; cpu = 0.1; memory = "64M"
  env {{ ROUND = "{round_}"; {extra} }}
  health {{ path = "/health"; interval = "1s"; deadline = "2s" }}
  route "app.example.com" {{ path = "/" }}
}}
'''


async def test_twenty_updates_and_twenty_broken_ones_lose_no_request(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    await cluster.deploy(manifest("v1", 0))
    ports = (cluster.http("node-1"), cluster.http("node-2"))
    async with load(*ports, host="app.example.com") as traffic:
        for number in range(1, ROUNDS + 1):
            tag = "v2" if number % 2 else "v1"
            async with cluster.client() as client:
                text = manifest(tag, number).replace("REG", cluster.registry)
                traffic.barrier("")
                async for event in client.deploy({"app.mill": text}):
                    if event.step.phase == "routed":
                        traffic.barrier(tag)
                assert event.step.outcome == "deployed"
            broken = manifest("v1", number, 'EXIT_AFTER_MS = "30"') if number % 4 \
                else manifest("vbad", number)
            seen = await cluster.deploy(broken)
            assert seen[-1][1].outcome == "rolled_back"  # type: ignore[attr-defined]  # a step
            assert not traffic.failures, traffic.failures[:5]
        sent, rate = traffic.sent, traffic.rate
    with capsys.disabled():
        print(f"\n{sent} requests sent at {rate:.0f}/s, {len(traffic.failures)} failed "
              f"over {ROUNDS} updates and {ROUNDS} broken ones")
    assert traffic.failures == []
    assert rate >= 200
    assert set(traffic.versions) == {"v1", "v2"}
