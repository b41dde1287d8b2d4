"""The seed's deploy on three real nodes, and what a user then sees."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from reconciler.api.client import Refused
from tests.end_to_end.conftest import Cluster
from tests.end_to_end.seed import SEED, answering, curl, dig, printed

pytestmark = [pytest.mark.containers, pytest.mark.timeout(300)]

SECRET = "postgres://clear-text-7f3a@db/app"


async def _seed(cluster: Cluster) -> list[tuple[str, object]]:
    async with cluster.client() as client:
        await client.set_secret("db.url", SECRET)
    return await cluster.deploy(SEED)


async def test_the_seed_is_deployed_routed_and_resolved(cluster: Cluster) -> None:
    seen = await _seed(cluster)
    phases = [phase for phase, _ in seen]
    assert phases[0] == "started"
    assert phases[-2:] == ["routed", "done"]
    assert phases.count("scheduled") == 3
    for node in ("node-1", "node-2", "node-3"):
        assert len(await answering(cluster.http(node))) == 2
    assert (await curl(cluster.http(), host="nobody.example.com")).endswith("404")
    assert (await curl(cluster.http(), host="APP.example.com:80")).endswith("200")
    for node in ("node-1", "node-3"):
        web = await dig(cluster.dns(node), "web.mill")
        assert web.startswith("10.97.")
        assert await dig(cluster.dns(node), "api.mill") not in ("", web)
        assert web == await dig(cluster.dns(node), "web.mill", "A", "+tcp")
    assert await dig(cluster.dns(), "web.mill", "AAAA") == ""
    status = await printed("dig", "@127.0.0.1", "-p", str(cluster.dns()), "nobody.mill")
    assert "NXDOMAIN" in status
    status = await printed("dig", "@127.0.0.1", "-p", str(cluster.dns()), "web.mill", "AAAA")
    assert "NOERROR" in status


async def test_a_container_reaches_another_service_by_name(cluster: Cluster) -> None:
    """Its health command asks web.mill, from every node that has one of the askers."""
    seen = await cluster.deploy('''
service "web" {
  image = "REG/web:v1"; port = 3000; replicas = 1; cpu = 0.1; memory = "64M"
  health { path = "/health"; interval = "1s" }
}
service "asker" {
  image = "REG/api:v1"; port = 8080; replicas = 3; cpu = 0.1; memory = "64M"
  depends_on = ["web"]
  env { PEER = "${service.web.address}" }
  health { command = ["/server", "fetch", "web.mill", "3000", "/health"]; deadline = "20s" }
}
''')
    assert seen[-1][1].outcome == "deployed", seen[-1]  # type: ignore[attr-defined]  # a step


async def test_a_broken_deploy_leaves_the_same_containers_serving(cluster: Cluster) -> None:
    await _seed(cluster)
    before = await answering(cluster.http())
    broken = SEED.replace("web:v1", "web:vbad").replace(
        'interval = "5s"', 'interval = "5s"; deadline = "1s"')
    seen = await cluster.deploy(broken)
    step = seen[-1][1]
    assert step.outcome == "rolled_back"  # type: ignore[attr-defined]  # a step
    assert "500" in step.reason  # type: ignore[attr-defined]  # a step
    assert any("serving" in line for line in step.logs)  # type: ignore[attr-defined]  # a step
    assert await answering(cluster.http()) == before
    async with cluster.client() as client:
        services = (await client.services()).services
    assert {s.name: s.revision for s in services} == {"web": 1, "api": 1}


async def test_running_out_of_memory_is_told_apart_from_an_exit(cluster: Cluster) -> None:
    eats = '''
service "eater" {
  image = "REG/web:v1"; cpu = 0.5; memory = "32M"
  command = ["eat", "256"]
  health { command = ["/server", "read", "/nothing"]; deadline = "20s" }
}
'''
    step = (await cluster.deploy(eats))[-1][1]
    assert "out of memory" in step.reason  # type: ignore[attr-defined]  # a step
    exits = eats.replace('["eat", "256"]', '["exit", "7"]')
    step = (await cluster.deploy(exits))[-1][1]
    assert "exited with code 7" in step.reason  # type: ignore[attr-defined]  # a step


async def test_a_secret_is_in_clear_on_no_disk_but_containerds_own(cluster: Cluster) -> None:
    await _seed(cluster)
    data = Path(cluster.dev.data)
    found = subprocess.run(["grep", "-rlF", "clear-text-7f3a", str(data)], capture_output=True,
                           text=True, check=False).stdout.split()
    assert all(path.startswith(str(data / "containerd")) for path in found), found
    async with cluster.client() as client:
        assert (await client.secret("db.url")).value == SECRET
        assert SECRET not in str(await client.events())
        with pytest.raises(Refused, match="api"):
            await client.delete_secret("db.url")


async def test_what_does_not_fit_or_is_not_built_is_refused_before_anything_happens(
    cluster: Cluster
) -> None:
    async with cluster.client() as client:
        before = (await client.status()).index
        with pytest.raises(Refused) as huge:
            async for _ in client.deploy({"a.mill": SEED.replace("REG", cluster.registry)
                                          .replace('cpu = 0.5', 'cpu = 900')
                                          .replace("${secret(db.url)}", "x")}):
                pass
        assert huge.value.status == 409
        assert "node-" in huge.value.what
        with pytest.raises(Refused) as unknown:
            async for _ in client.deploy({"a.mill": SEED.replace("REG", cluster.registry)}):
                pass
        assert unknown.value.status == 422
        assert "db.url" in str(unknown.value.problem.errors)
        assert (await client.status()).index == before
