"""Every benchmark in turn, each in a process of its own: `make bench`.

Figures of a shared machine differ by half from run to run; compare within one run.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ORDER = ("language", "plan", "log", "edge", "cli", "deploy")
"""From the purest part to the whole way."""


def main() -> int:
    """1 where a benchmark failed; the others run all the same."""
    failed = []
    for name in ORDER:
        if not Path(__file__).with_name(f"{name}.py").exists():
            print(f"== {name}: there is no such benchmark", flush=True)
            failed.append(name)
            continue
        print(f"\n== {name}", flush=True)
        root = Path(__file__).resolve().parents[1]
        command = [sys.executable, "-m", f"bench.{name}"]
        if subprocess.run(command, cwd=root, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
