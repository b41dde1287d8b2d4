"""The mission's own manifest, and the ways to look at what came of it."""

from __future__ import annotations

import asyncio

SEED = '''
service "web" {
  image = "REG/web:v1"
  port = 3000; replicas = 2; cpu = 0.5; memory = "512M"
  health { path = "/health"; interval = "5s" }
  route "app.example.com" { path = "/" }
}

service "api" {
  image = "REG/api:v1"
  port = 8080; cpu = 1; memory = "1G"
  env { DATABASE_URL = "${secret(db.url)}" }
  health { path = "/healthz"; interval = "10s" }
}
'''


async def printed(*words: str) -> str:
    """What a command printed, errors included."""
    child = await asyncio.create_subprocess_exec(
        *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
    told, _ = await child.communicate()
    return told.decode().strip()


async def curl(port: int, host: str = "app.example.com", path: str = "/", *more: str) -> str:
    """Status and body, separated by a space."""
    return await printed("curl", "-s", "-m", "10", "-o", "-", "-w", " %{http_code}", *more,
                         "-H", f"Host: {host}", f"http://127.0.0.1:{port}{path}")


async def dig(port: int, name: str, kind: str = "A", *more: str) -> str:
    """dig's short answer."""
    return await printed("dig", "+short", "+time=3", "@127.0.0.1", "-p", str(port), name, kind,
                         *more)


async def answering(port: int, requests: int = 30) -> set[str]:
    """The allocations that answer through the ingress."""
    seen = set()
    for _ in range(requests):
        body = await curl(port)
        if body.endswith(" 200"):
            seen.add(next(w for w in body.split() if w.startswith("alloc=")))
    return seen
