"""Ways to say a manifest in a test and to look at what was read."""

from __future__ import annotations

from reconciler.language.problems import Problem
from reconciler.language.read import Reading, read_manifest
from reconciler.language.spec import ServiceSpec, TaskSpec

SEED = """service "web" {
  image = "registry.example.com/web:v1"
  port = 3000; replicas = 2; cpu = 0.5; memory = "512M"
  health { path = "/health"; interval = "5s" }
  route "app.example.com" { path = "/" }
}

service "api" {
  image = "registry.example.com/api:v1"
  port = 8080; cpu = 1; memory = "1G"
  env { DATABASE_URL = "${secret(db.url)}" }
  health { path = "/healthz"; interval = "10s" }
}
"""


def read(*texts: str, **variables: str) -> Reading:
    """Read texts as files a.mill, b.mill, ..."""
    files = {f"{chr(97 + at)}.mill": text.encode() for at, text in enumerate(texts)}
    return read_manifest(files, variables)


def service(body: str = "", head: str = 'image = "a"') -> ServiceSpec:
    """The one service that has this body, and is right."""
    reading = read(f'service "s" {{\n{head}\n{body}\n}}')
    assert reading.problems == ()
    return reading.manifest.services[0]


def task(body: str = "") -> TaskSpec:
    """The one task that has this body, and is right."""
    reading = read(f'task "t" {{\nimage = "a"\n{body}\n}}')
    assert reading.problems == ()
    return reading.manifest.tasks[0]


def problem(*texts: str, **variables: str) -> Problem:
    """The one problem of a manifest."""
    reading = read(*texts, **variables)
    assert len(reading.problems) == 1, reading.problems
    return reading.problems[0]


def wrong(body: str, head: str = 'image = "a"') -> Problem:
    """The one problem of a service with this body, which begins at line 3."""
    return problem(f'service "s" {{\n{head}\n{body}\n}}')


def place(found: Problem) -> tuple[str, int, int]:
    return found.file, found.line, found.column
