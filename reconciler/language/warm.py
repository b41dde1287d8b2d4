"""`python -m reconciler.language.warm`: build the grammar's tables where every process finds them.

python-hcl2 keeps them in a file beside its own code, written by the first parse whose user may
write there. Without it every process pays 1.2 to 1.7 s, so an install runs this once.
"""

from __future__ import annotations

from reconciler.language.read import read_manifest

_TEXT = b'service "warm" { image = "warm"; env { A = "b" } }\n'


def warm() -> None:
    """Parse one small manifest."""
    reading = read_manifest({"warm.mill": _TEXT})
    assert not reading.problems


if __name__ == "__main__":
    warm()
