"""The manifests in a commit's tree: a bounded walk that follows nothing and writes nothing.

All names and contents are a stranger's. Names serve as labels only, never as paths on a disk.
"""

from __future__ import annotations

import stat
from collections.abc import Callable

from dulwich.objects import Blob, Commit, ObjectID, ShaFile, Tree

from reconciler.git.findings import Bounds

SUFFIX = ".mill"
_NEVER = frozenset({b"", b".", b"..", b".git"})

Lookup = Callable[[ObjectID], ShaFile]


class TreeRefused(Exception):
    """The tree holds or costs what no source may; the text says which."""


class PathMissing(Exception):
    """The commit has no such folder; the text is its path."""


def read_manifests(
    lookup: Lookup, commit: Commit, parts: tuple[str, ...], bounds: Bounds
) -> dict[str, bytes]:
    """Every regular `*.mill` file below the folder `parts`, by its path in the repository.

    `lookup` raises KeyError for an object that was not sent, because it is over the bound.
    """
    root = _folder(lookup, commit.tree, parts)
    base = b"".join(part.encode() + b"/" for part in parts)
    files: dict[str, bytes] = {}
    visited = total = 0
    stack: list[tuple[ObjectID, bytes, int]] = [(root, base, 1)]
    while stack:
        tree_id, prefix, depth = stack.pop()
        if depth > bounds.depth:
            raise TreeRefused(f"folders are nested deeper than {bounds.depth}")
        for name, mode, sha in _tree(lookup, tree_id).iteritems(name_order=True):
            visited += 1
            if visited > bounds.entries:
                raise TreeRefused(f"there are more than {bounds.entries:,} files and folders; "
                                  "point the source's path at the folder with the manifests")
            if name.lower() in _NEVER or b"/" in name:
                raise TreeRefused(f"the tree holds an entry that git forbids: {name[:80]!r}")
            if stat.S_ISDIR(mode):
                stack.append((sha, prefix + name + b"/", depth + 1))
            elif name.endswith(SUFFIX.encode()):
                data = _manifest(lookup, prefix + name, mode, sha, bounds)
                files[_label(prefix + name)] = data
                total += len(data)
                _check_sum(len(files), total, bounds)
    return dict(sorted(files.items()))


def _folder(lookup: Lookup, tree_id: ObjectID, parts: tuple[str, ...]) -> ObjectID:
    for number, part in enumerate(parts, 1):
        try:
            mode, tree_id = _tree(lookup, tree_id)[part.encode()]
        except KeyError as error:
            raise PathMissing("/" + "/".join(parts[:number])) from error
        if not stat.S_ISDIR(mode):
            raise PathMissing("/" + "/".join(parts[:number]))
    return tree_id


def _tree(lookup: Lookup, tree_id: ObjectID) -> Tree:
    try:
        found = lookup(tree_id)
    except KeyError as error:
        raise TreeRefused("the repository is not whole: a folder's object is missing") from error
    if not isinstance(found, Tree):
        raise TreeRefused("the tree says folder where there is none")
    return found


def _manifest(
    lookup: Lookup, path: bytes, mode: int, sha: ObjectID, bounds: Bounds
) -> bytes:
    label = _label(path)
    if stat.S_ISLNK(mode):
        raise TreeRefused(f"{label} is a link, and links are not followed: commit the text itself")
    if not stat.S_ISREG(mode):
        raise TreeRefused(f"{label} is a submodule, not a file")
    too_large = TreeRefused(f"{label} is larger than {bounds.file_bytes // 1024} KiB")
    try:
        blob = lookup(sha)
    except KeyError as error:
        raise too_large from error
    if not isinstance(blob, Blob):
        raise TreeRefused(f"{label} says file where there is none")
    data = blob.data
    if len(data) > bounds.file_bytes:
        raise too_large
    return data


def _label(path: bytes) -> str:
    try:
        label = path.decode()
    except UnicodeDecodeError as error:
        raise TreeRefused(f"a manifest's name is not UTF-8: {path[:200]!r}") from error
    if not label.isprintable() or "\\" in label:
        raise TreeRefused(f"a manifest's name is not printable: {label[:200]!r}")
    return label


def _check_sum(files: int, total: int, bounds: Bounds) -> None:
    if files > bounds.files:
        raise TreeRefused(f"there are more than {bounds.files:,} manifests")
    if total > bounds.total_bytes:
        raise TreeRefused(f"the manifests together are over {bounds.total_bytes // 1024} KiB")
