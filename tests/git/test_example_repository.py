"""The repository that people copy: what a cluster would read of it is valid."""

from __future__ import annotations

import shutil
from pathlib import Path

from reconciler.git.findings import Commit
from reconciler.git.location import parse_location
from reconciler.git.poll import Poller
from reconciler.language.format import format_text
from reconciler.language.read import read_manifest
from tests.git.git_fixtures import Repository

EXAMPLE = Path(__file__).parents[2] / "examples" / "repo"


async def test_the_example_repository_is_a_valid_source(
    poller: Poller, repository: Repository
) -> None:
    shutil.copytree(EXAMPLE, repository.folder, dirs_exist_ok=True)
    repository.commit_all()
    found = await poller.look(parse_location(repository.url), "main", "/", "")
    assert isinstance(found, Commit)
    reading = read_manifest(found.files)
    assert reading.problems == ()
    assert [s.name for s in reading.manifest.services] == ["api", "web", "worker"]


def test_the_example_repository_is_in_canonical_form() -> None:
    texts = {path.name: path.read_text() for path in sorted(EXAMPLE.glob("*.mill"))}
    assert {name: format_text(text, name) for name, text in texts.items()} == texts
