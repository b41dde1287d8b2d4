"""What a call costs before it does anything: `mill --help` beside a bare interpreter.

Run: python -m bench.cli. Medians in milliseconds, taken in turns in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

MILL = "from reconciler.cli.main import main; main()"


def spent_ms(code: str, *arguments: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
    return (time.perf_counter() - began) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    spent_ms(MILL, "--help")  # the first writes byte code
    calls, floors = [], []
    for _ in range(rounds):
        floors.append(spent_ms("pass"))
        calls.append(spent_ms(MILL, "--help"))
    call, floor = statistics.median(calls), statistics.median(floors)
    print(f"mill --help {call:.1f} ms, python -c pass {floor:.1f} ms, ratio {call / floor:.2f}")


if __name__ == "__main__":
    main()
