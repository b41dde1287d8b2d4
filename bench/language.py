"""Reading manifests: milliseconds for 1 to 1,000 services, beside the bare grammar.

Run: python -m bench.language. Medians over several runs; `ratio` is mill's time (checked text,
tree, schema, checks across services, hashes) over that of python-hcl2's tree of the same text
with `;` written as new lines, in the same process. The last line is a read through the child
process whose files have not changed.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import sys
import time
from collections.abc import Callable

import hcl2

from reconciler.executor.reading import Reader
from reconciler.language.read import read_manifest
from reconciler.language.spec import spec_hash

SERVICE = """service "web-{n}" {{
  image = "registry.example.com/web:v1"
  port = 3000; replicas = 2; cpu = 0.5; memory = "512M"
  env {{ DATABASE_URL = "${{secret(db.url)}}"; MODE = "production" }}
  health {{ path = "/health"; interval = "5s" }}
  route "app-{n}.example.com" {{ path = "/" }}
}}
"""


def text_of(services: int) -> str:
    return "\n".join(SERVICE.format(n=n) for n in range(services))


def read(files: dict[str, bytes]) -> None:
    reading = read_manifest(files)
    assert not reading.problems
    for service in reading.manifest.services:
        spec_hash(service)


def median_ms(work: Callable[[], object], times: int) -> float:
    spent = []
    for _ in range(times):
        gc.collect()
        began = time.perf_counter()
        work()
        spent.append((time.perf_counter() - began) * 1000)
    return statistics.median(spent)


async def unchanged_ms(files: dict[str, bytes]) -> tuple[float, float]:
    """(the first read, every further one) of the same files through a reader."""
    reader = Reader()
    try:
        await reader.read({"warm.mill": b""}, {})
        began = time.perf_counter()
        first = await reader.read(files, {})
        first_ms = (time.perf_counter() - began) * 1000
        assert not first.problems
        began = time.perf_counter()
        for _ in range(100):
            await reader.read(files, {})
        return first_ms, (time.perf_counter() - began) * 10
    finally:
        await reader.close()


def main() -> None:
    hcl2.parses_to_tree("a = 1")
    print(f"{'services':>8} {'mill ms':>9} {'grammar ms':>11} {'ratio':>6}")
    sizes = [1, 10, 100, 1000] if "--quick" not in sys.argv else [1, 10]
    for services in sizes:
        text = text_of(services)
        plain = text.replace("; ", "\n")
        # 256 KiB is the most one file may hold.
        files = {f"{at}.mill": text_of_slice(at, services) for at in range(0, services, 500)}
        times = 15 if services <= 100 else 3
        mill = median_ms(lambda files=files: read(files), times)
        bare = median_ms(lambda plain=plain: hcl2.parses_to_tree(plain), times)
        print(f"{services:>8} {mill:>9.1f} {bare:>11.1f} {mill / bare:>6.2f}")
    first, again = asyncio.run(unchanged_ms({"app.mill": text_of(100).encode()}))
    print(f"100 services through the child process: first {first:.1f} ms, unchanged {again:.3f} ms")


def text_of_slice(start: int, services: int) -> bytes:
    return "\n".join(
        SERVICE.format(n=n) for n in range(start, min(start + 500, services))
    ).encode()


if __name__ == "__main__":
    main()
