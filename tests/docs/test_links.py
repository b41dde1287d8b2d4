"""Every place that a document points to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, inline, name, prose

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_PATH = re.compile(r"(?:reconciler|tests|docs|examples|bench|protos)/[\w./-]*")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in _LINK.findall(prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name(page)} links to {target}, which is not there"
        if anchor:
            assert anchor in _anchors(found), f"{name(page)} links to {target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_path_of_the_repository_that_is_named_exists(page: Path) -> None:
    named = [code for code in inline(prose(page)) if _PATH.fullmatch(code)]
    assert [code for code in named if not (ROOT / code).exists()] == []


def test_the_architecture_names_every_package_and_the_files_that_it_sends_to() -> None:
    text = prose(ROOT / "docs" / "architecture.md")
    packages = [p.parent for p in (ROOT / "reconciler").rglob("__init__.py")]
    for package in packages:
        if package.name not in ("reconciler", "generated"):
            assert f"`reconciler/{package.relative_to(ROOT / 'reconciler')}/`" in text
    for row in re.findall(r"^\| [^|]+ \| (`reconciler/[^|]*) \| [^|]+ \| ([^|]+) \|$", text,
                          re.MULTILINE):
        folders = [ROOT / code for code in inline(row[0])]
        for file in re.findall(r"`(\w+\.py)`", row[1]):
            places = [folder.parent if folder.is_file() else folder for folder in folders]
            assert any((place / file).is_file() for place in places), f"{file} in {row[0]}"


def _anchors(page: Path) -> set[str]:
    """Headings as forges make anchors of them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
