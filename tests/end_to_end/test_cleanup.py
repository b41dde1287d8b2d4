"""What `mill dev` made goes with it: processes, namespaces, mounts, cgroups, folders."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.conftest import running
from tests.end_to_end.seed import SEED

pytestmark = [pytest.mark.containers, pytest.mark.timeout(300)]


def traces(tag: str) -> list[str]:
    """All that carries the tag on this host."""
    processes = [
        entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit()
        and tag.encode() in _bytes(entry / "cmdline")
    ]
    mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if tag in line]
    names = [str(p) for p in Path("/run").iterdir() if tag in p.name]
    names += [str(p) for p in Path("/run/netns").iterdir() if tag in p.name]
    cgroups = [str(p) for p in Path("/sys/fs/cgroup").glob(f"*/mill-{tag}*")]
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True)
    return [*processes, *mounts, *names, *cgroups,
            *(line for line in links.stdout.splitlines() if tag in line)]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


async def test_nothing_that_carries_the_tag_is_left(tmp_path: Path, registry: str) -> None:
    async with running(tmp_path / "dev", registry) as cluster:
        await cluster.deploy(SEED.replace("${secret(db.url)}", "x"))
        tag = cluster.dev.tag
        assert traces(tag)
        folder = str(cluster.dev.data)
    assert traces(tag) == []
    assert not Path(folder).exists()
    mounts = Path("/proc/self/mounts").read_text()
    assert folder not in mounts


async def test_containers_stop_with_the_cluster_and_state_stays(
    tmp_path: Path, registry: str
) -> None:
    from reconciler.dev import Dev, Options
    from tests.end_to_end.conftest import Cluster
    from tests.ports import free_base

    dev = Dev(Options(nodes=1, data=tmp_path / "dev", base_port=free_base(1)), lambda _: None)
    try:
        async with dev.up() as founding:
            await Cluster(dev, founding, registry, []).deploy(SEED.replace(
                "${secret(db.url)}", "x").replace("replicas = 2", "replicas = 1"))
        assert traces(dev.tag) == []
        assert (tmp_path / "dev" / "node-1" / "log" / "journal").exists()
    finally:
        await dev.reset()
