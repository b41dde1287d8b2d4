"""Every test, in two lanes side by side: clusters mostly wait, and everything else mostly computes.

`python -m tests.together [PYTEST OPTIONS]` prints one lane as it runs and the other after it, and
ends with 1 if either failed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent
CLUSTERS = ("end_to_end", "machines")
"""Whole clusters with real containers: most of their time is timers and starting processes."""


def lanes() -> tuple[list[str], list[str]]:
    """The folders of both lanes; a new folder of tests is in the second by itself."""
    rest = sorted(path.parent.name for path in ROOT.glob("*/__init__.py")
                  if path.parent.name not in CLUSTERS)
    return [f"tests/{name}" for name in CLUSTERS], [f"tests/{name}" for name in rest]


def main(options: list[str]) -> int:
    clusters, rest = lanes()
    pytest = [sys.executable, "-m", "pytest", "-q", *options]
    with tempfile.TemporaryFile("w+") as kept:
        print(f"-- beside it, printed at the end: {' '.join(clusters)}", flush=True)
        beside = subprocess.Popen([*pytest, *clusters], stdout=kept, stderr=subprocess.STDOUT)
        try:
            first = subprocess.run([*pytest, *rest], check=False).returncode
            second = beside.wait()
        finally:
            if beside.poll() is None:
                beside.terminate()
                beside.wait()
        kept.seek(0)
        print(f"-- {' '.join(clusters)}\n{kept.read()}", flush=True)
    print(f"-- everything else: {'passed' if first == 0 else f'failed ({first})'}; "
          f"clusters: {'passed' if second == 0 else f'failed ({second})'}")
    return 1 if first or second else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
