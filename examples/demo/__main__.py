"""`make demo`: images, registry, cluster, deploy, traffic, a broken deploy, a pushed commit."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from tests.end_to_end.load import Load, load
from tests.images.build import publish_demo_images
from tests.images.registry import local_registry
from tests.ports import free_base

HERE = Path(__file__).parent
MILL = str(Path(sys.executable).parent / "mill")
HOST = "app.example.com"
FREE_BYTES = 3 * 1024**3


class DemoFailed(Exception):
    """A step did not do what it should; the demo stops, cleans up and says so."""


def say(text: str = "") -> None:
    print(text, flush=True)


def check() -> None:
    """One line where this machine cannot run the demo."""
    if os.geteuid() != 0:
        raise DemoFailed("root is needed to run containers: sudo make demo")
    for program in ("containerd", "runc", "docker-registry", "git", "curl", "dig"):
        if shutil.which(program) is None:
            raise DemoFailed(f"{program} is missing: make install")
    free = shutil.disk_usage(".").free
    if free < FREE_BYTES:
        raise DemoFailed(f"3 GB of free disk are needed, there are {free // 1024**2} MB")


class Demo:
    """A cluster in a folder that goes away with it."""

    def __init__(self, folder: Path, registry: str) -> None:
        self.folder = folder
        self.registry = registry
        self.base = free_base()
        # Its own home: the contexts of whoever runs the demo stay as they are.
        self.env = {**os.environ, "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1"}

    def port(self, node: int, what: int) -> int:
        return self.base + 10 * (node - 1) + what

    async def run(self, *words: str, shown: str = "", text: str = "", ok: bool = True) -> str:
        """Run a command as a person would see it; what it printed."""
        say(f"$ {shown or ' '.join(words)}")
        program = MILL if words[0] == "mill" else words[0]
        child = await asyncio.create_subprocess_exec(
            program, *words[1:], env=self.env, cwd=self.folder, stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
        told, _ = await child.communicate(text.encode())
        output = told.decode().rstrip()
        if output:
            say(output)
        if ok and child.returncode:
            raise DemoFailed(f"{' '.join(words)} ended with {child.returncode}")
        return output

    async def quietly(self, *words: str) -> None:
        """Run a command that a person need not see."""
        child = await asyncio.create_subprocess_exec(
            *words, env=self.env, cwd=self.folder, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT)
        told, _ = await child.communicate()
        if child.returncode:
            raise DemoFailed(f"{' '.join(words)}: {told.decode().strip()}")

    @contextlib.asynccontextmanager
    async def cluster(self) -> AsyncIterator[None]:
        """`mill dev --nodes 3`, until the end of the context."""
        words = ["dev", "--nodes", "3", "--data", "dev", "--base-port", str(self.base)]
        say(f"$ mill {' '.join(words)}")
        child = await asyncio.create_subprocess_exec(
            MILL, *words, env=self.env, cwd=self.folder, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT)
        assert child.stdout is not None
        try:
            async with asyncio.timeout(90):
                while line := (await child.stdout.readline()).decode().rstrip():
                    say(line)
                    if line.split()[:1] == ["ready"]:
                        break
                else:
                    raise DemoFailed("mill dev ended before it was ready")
            rest = asyncio.create_task(child.stdout.read())
            yield
            rest.cancel()
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGINT)
            await child.wait()
            await self.quietly(MILL, "dev", "--reset", "--data", "dev")

    def manifest(self, tag: str = "v1", deadline: str = "") -> str:
        text = (HERE / "app.mill").read_text().replace("registry.example.com", self.registry)
        text = text.replace("/web:v1", f"/web:{tag}")
        return text.replace('interval = "5s"', f'interval = "5s"; deadline = "{deadline}"') \
            if deadline else text

    async def both_replicas(self, version: str) -> None:
        """curl through the ingress until both replicas have answered."""
        url = f"http://127.0.0.1:{self.port(1, 4)}/"
        seen: set[str] = set()
        say(f"$ curl -H 'Host: {HOST}' {url}")
        for _ in range(50):
            child = await asyncio.create_subprocess_exec(
                "curl", "-sS", "-m", "5", "-H", f"Host: {HOST}", url,
                stdout=asyncio.subprocess.PIPE)
            answer = (await child.communicate())[0].decode().strip()
            if f"version={version}" in answer and answer not in seen:
                seen.add(answer)
                say(f"  {answer}")
            if len(seen) == 2:
                return
        raise DemoFailed(f"only {len(seen)} replicas of {version} answered")

    async def dig(self, name: str) -> None:
        address = await self.run("dig", "+short", "@127.0.0.1", "-p", str(self.port(2, 3)), name)
        if not address:
            raise DemoFailed(f"{name} does not resolve")

    async def broken(self, traffic: Load) -> None:
        """A deploy that is never healthy, under load."""
        (self.folder / "broken.mill").write_text(self.manifest("vbad", deadline="3s"))
        told = await self.run("mill", "deploy", "-f", "broken.mill", ok=False)
        if "rolled back" not in told:
            raise DemoFailed("the broken deploy was not rolled back")
        say(f"  {traffic.sent} requests during it, {len(traffic.failures)} failed")
        if traffic.failures or not traffic.sent:
            raise DemoFailed(f"requests failed: {traffic.failures[:3]}")

    async def push(self) -> None:
        """A repository that the cluster follows, and a commit pushed to it."""
        git = ["git", "-c", "user.name=Ada", "-c", "user.email=ada@example.com", "-C", "work"]
        await self.quietly("git", "init", "-q", "--bare", "-b", "main", "app.git")
        await self.quietly("git", "clone", "-q", "app.git", "work")
        (self.folder / "work" / "app.mill").write_text(self.manifest("v2"))
        await self.quietly(*git, "checkout", "-q", "-b", "main")
        await self.quietly(*git, "add", "app.mill")
        await self.run("mill", "git", "add", "app", f"file://{self.folder}/app.git",
                       "--poll", "1s")
        await self.run(*git, "commit", "-q", "-m", "web: v2", shown="git commit -m 'web: v2'")
        await self.run(*git, "push", "-q", "origin", "main", shown="git push")
        await self.synced()
        await self.run("mill", "git", "show", "app")
        await self.both_replicas("v2")

    async def synced(self) -> None:
        began = time.monotonic()
        while time.monotonic() - began < 60:
            child = await asyncio.create_subprocess_exec(
                MILL, "--json", "git", "show", "app", env=self.env, cwd=self.folder,
                stdout=asyncio.subprocess.PIPE)
            shown = (await child.communicate())[0].decode().replace(" ", "")
            if '"status":"synced"' in shown and '"applied":""' not in shown:
                return
        raise DemoFailed("the pushed commit was not deployed within 60 s")

    async def walk(self) -> None:
        (self.folder / "app.mill").write_text(self.manifest())
        await self.run("mill", "secret", "set", "db.url", text="postgres://db.internal/app")
        await self.run("mill", "deploy", "-f", "app.mill")
        say("\n# both replicas answer through the ingress, and names resolve")
        await self.both_replicas("v1")
        await self.dig("web.mill")
        await self.dig("api.mill")
        say("\n# a version that is never healthy, deployed under load")
        async with load(self.port(1, 4), self.port(2, 4), host=HOST) as traffic:
            await self.broken(traffic)
        say("\n# a repository that the cluster follows")
        await self.push()


async def main() -> int:
    began = time.monotonic()
    try:
        check()
        with tempfile.TemporaryDirectory(prefix="mill-demo-") as folder:
            registry_folder = Path(folder) / "registry"
            registry_folder.mkdir()
            say("# two small images, built here, in a registry on a free port")
            with local_registry(registry_folder) as url:
                publish_demo_images(url)
                demo = Demo(Path(folder), url.removeprefix("http://"))
                say(f"  {demo.registry}/web, {demo.registry}/api\n\n# three nodes")
                async with demo.cluster():
                    await demo.walk()
    except DemoFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    say(f"\ndemo done in {time.monotonic() - began:.0f} s; everything it made is gone")
    return 0


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main()))
