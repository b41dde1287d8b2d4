"""All machines are lost; a file and its passphrase bring everything back on new ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from reconciler.api.client import Refused
from tests.end_to_end.conftest import eventually, running
from tests.end_to_end.seed import SEED, answering, curl

pytestmark = [pytest.mark.containers, pytest.mark.timeout(300)]

SECRET = "postgres://clear-text-7f3a@db/app"
PASSPHRASE = "correct horse battery"


async def test_what_a_lost_cluster_served_another_serves_from_its_backup(
    tmp_path: Path, registry: str
) -> None:
    async with running(tmp_path / "old", registry) as lost:
        async with lost.client() as client:
            await client.set_secret("db.url", SECRET)
            before = (await client.status()).index
            await lost.deploy(SEED)
            then = await client.status()
            past = await client.status(at=before)
            assert (past.index, past.services) == (before, ())
            assert {s.name for s in (await client.status(at=then.index)).services} == {"api", "web"}
            with pytest.raises(Refused, match="not there yet"):
                await client.status(at=then.index + 10_000)
            data = await client.backup(PASSPHRASE)
        assert SECRET.encode() not in data
    async with running(tmp_path / "new", registry, nodes=1) as found:
        async with found.client() as client:
            told = await client.restore(data, PASSPHRASE)
            assert told.services == ("api", "web")

            async def healthy() -> bool:
                rows = (await client.services()).services
                return all(row.replicas.healthy == row.replicas.desired for row in rows)

            await eventually(healthy, 120.0)
            rows = {row.name: row for row in (await client.services()).services}
            for old in then.services:
                assert rows[old.name].digest == old.digest
                assert rows[old.name].revision == old.revision
            assert (await client.secret("db.url")).value == SECRET
            with pytest.raises(Refused, match="an empty one"):
                await client.restore(data, PASSPHRASE)

        async def both() -> bool:
            return len(await answering(found.http())) == 2

        await eventually(both)
        assert (await curl(found.http())).endswith("200")
        # And it is deployed over as any other.
        seen = await found.deploy(SEED.replace("replicas = 2", "replicas = 1"))
        assert seen[-1][0] == "done"
