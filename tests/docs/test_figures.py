"""Ports, limits, calls and packages in the documents are those of the code."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from importlib import metadata

import pytest

from reconciler import machine
from reconciler.api import bodies, limits, secrets, server
from reconciler.cli import dev
from reconciler.edge import bootstrap, certificates, dns
from reconciler.executor import admit, deploy, front, heal, joining, membership, reading, retire
from reconciler.executor.agent import logfile, probe
from reconciler.executor.containerd import network_machine, pull, spec
from reconciler.executor.containerd.network import VIP_PREFIX, Layout
from reconciler.executor.containerd.network_layout import (
    MACHINES_PREFIX,
    NODES_PREFIX,
    OVERLAY_PREFIX,
)
from reconciler.fsm import apply_cluster, apply_deploys, codec
from reconciler.git.findings import Bounds
from reconciler.language import read, source, tokens
from reconciler.log.settings import Settings, Timing
from reconciler.plan import place
from tests.docs.pages import ROOT, inline, page, table

OPERATIONS, LANGUAGE, ARCHITECTURE = "docs/operations.md", "docs/language.md", \
    "docs/architecture.md"
MACHINES, API = "docs/machines.md", "docs/api.md"
_SNAPSHOT_BYTES = next(f.default for f in Settings.__dataclass_fields__.values()
                       if f.name == "snapshot_bytes")
assert isinstance(_SNAPSHOT_BYTES, int)
_MIB = 1 << 20

FIGURES = [
    (OPERATIONS, f"| nodes of `mill dev` | {dev.MAX_NODES} |"),
    (OPERATIONS, f"| containers on a node | {place.NODE_ADDRESSES} addresses |"),
    (OPERATIONS, f"| replicas of a service | {admit.MAX_REPLICAS:,} |"),
    (OPERATIONS, f"| processes and threads of a container | {spec.PIDS_MAX:,} |"),
    (OPERATIONS, f"| layers of an image | {pull.LAYERS} |"),
    (OPERATIONS, f"| body of a request | {bodies.MAX_BODY_BYTES // _MIB} MiB |"),
    (OPERATIONS, f"| a secret's value | {secrets.MAX_VALUE_BYTES // 1024} KiB |"),
    (OPERATIONS, f"| {server.MAX_CONNECTIONS:,}; {bootstrap.MAX_CONNECTIONS:,} |"),
    (OPERATIONS, f"entry in the log | {codec.MAX_COMMAND_BYTES // 1024} KiB"),
    (OPERATIONS, f"wait up to {front.TURN_S / 60:g} min"),
    (OPERATIONS, f"at least the last {apply_cluster.KEPT_DEPLOYS} |"),
    (OPERATIONS, f"at least {apply_cluster.KEPT_EVENTS:,} |"),
    (OPERATIONS, f"| kept: revisions of a service | {apply_deploys.KEPT_REVISIONS} |"),
    (OPERATIONS, f"The last {apply_cluster.KEPT_SECRET_VERSIONS} versions of a secret"),
    (OPERATIONS, f"| journal until the next snapshot | {_SNAPSHOT_BYTES // _MIB} MiB |"),
    (OPERATIONS, f"| {Bounds().files:,}; {Bounds().total_bytes // _MIB} MiB; "
                 f"{Bounds().fetched_bytes // _MIB} MiB; {Bounds().cpu_s} s |"),
    (OPERATIONS, f"After {heal.DOWN_S:g} s without a heartbeat"),
    (OPERATIONS, "restarts: " + "{:g}, {:g}, {:g}, then {:g} s".format(*heal.BACKOFF_S)),
    (OPERATIONS, f"A deploy waits {deploy.EDGE_CONFIRM_S:g} s for the Envoy"),
    (OPERATIONS, f"did not stop within {deploy.UNDO_S:g} s"),
    (OPERATIONS, f"{len(logfile.NAMES)} files of {logfile.FILE_BYTES // _MIB} MiB"),
    (OPERATIONS, f"A line over {logfile.LINE_BYTES // 1024} KiB is split"),
    (OPERATIONS, f"certificates last {certificates.IDENTITY_DAYS} days, "
                 f"the CA {certificates.CA_DAYS // 365} years"),
    (MACHINES, f"It lasts {certificates.IDENTITY_DAYS} days"),
    (MACHINES, f"lasts {certificates.CA_DAYS // 365} years"),
    (MACHINES, f"once it is `down` ({heal.DOWN_S:g} s)"),
    (MACHINES, f"After {heal.DOWN_S:g} s the lost nodes are `down`"),
    (MACHINES, f"VXLAN (id {network_machine.VXLAN_ID}, UDP {network_machine.VXLAN_PORT})"),
    (MACHINES, f"`{NODES_PREFIX}`, `{VIP_PREFIX}`, `{OVERLAY_PREFIX}` and `{MACHINES_PREFIX}`"),
    (MACHINES, f"Ports {machine.HTTP_PORT} and {machine.HTTPS_PORT} of every machine"),
    (MACHINES, f"| `{machine.DATA}/node.json` |"),
    (MACHINES, f"| `{machine.Place().run}/` |"),
    (API, f"more than {limits.BURST} wrong tokens at once from one address"),
    (LANGUAGE, f"| files of a manifest | {source.MAX_FILES:,} |"),
    (LANGUAGE, f"| one file | {source.MAX_FILE_BYTES // 1024} KiB |"),
    (LANGUAGE, f"| all files together | {source.MAX_MANIFEST_BYTES // _MIB} MiB |"),
    (LANGUAGE, f"| services; tasks; variables | {read.MAX_SERVICES:,} each |"),
    (LANGUAGE, f"| nesting | {tokens.MAX_NESTING} |"),
    (LANGUAGE, f"| {tokens.MAX_TOKENS:,} a file, {read.MAX_TOKENS:,} together |"),
    (LANGUAGE, "{}, {}, {} and {} ms after the start".format(*probe.FIRST_MS)),
    (LANGUAGE, f"most {probe.EAGER_MS} ms apart"),
    (LANGUAGE, f"{reading.MEMORY_BYTES >> 30} GiB of memory and {reading.CPU_S:g} s of"),
    (ARCHITECTURE, f"from {Timing().election_min_s:g} to {Timing().election_max_s:g} s"),
    (ARCHITECTURE, f"heartbeats go out every {Timing().heartbeat_s:g} s"),
    (ARCHITECTURE, f"lets go after {Timing().step_down_s:g} s"),
    (ARCHITECTURE, f"drained (at most {retire.DRAIN_S:g} s)"),
    (ARCHITECTURE, f"TTL {dns.TTL_S} s"),
    (ARCHITECTURE, f"`{VIP_PREFIX}`"),
    (ARCHITECTURE, Layout("t", "node-2", 2).gateway + "/24"),
    (ARCHITECTURE, Layout("t", "node-2", 2).hub_address),
]


@pytest.mark.parametrize(("path", "words"), FIGURES)
def test_a_figure_is_the_codes_own(path: str, words: str) -> None:
    assert words in " ".join(page(path).split()), f"{path} does not say: {words}"


def test_the_ports_are_those_of_mill_dev() -> None:
    rows = table(OPERATIONS, "port", "what")
    told = {int(row["port"]): row["what"] for row in rows}
    assert set(told) == set(dev.PORTS)
    for offset, what in dev.PORTS.items():
        assert what.lower() in told[offset].lower()
    (base,) = [option.default for option in dev.dev.params if option.name == "base_port"]
    assert f"--base-port {base}" in page(OPERATIONS)


def test_the_ports_of_a_machine_are_those_that_it_listens_on() -> None:
    told = {row["port"] for row in table(MACHINES, "port", "for")}
    tcp = {machine.API_PORT, machine.LOG_PORT, machine.AGENT_PORT}
    assert told == {f"{port}/tcp" for port in tcp} | {f"{network_machine.VXLAN_PORT}/udp"}


def test_who_votes_and_how_many_may_be_lost_is_as_the_leader_decides_it() -> None:
    rows = {row["nodes"]: row for row in table(MACHINES, "nodes", "voters")}
    many, last = "6 to 20", 20
    assert list(rows) == ["1", "2", "3", "4", "5", many]
    for nodes in range(1, last + 1):
        row = rows.get(str(nodes), rows[many])
        voters = membership.wanted_voters(nodes)
        assert row["voters"] == str(voters)
        assert row["voters that may be lost at once"].partition(":")[0] == str((voters - 1) // 2)


def test_a_join_token_and_the_wait_before_an_exchange_are_as_told() -> None:
    assert joining.JOIN_TOKEN_MS == 3_600_000
    assert "A token is good for an hour and for its uses" in page(MACHINES)
    assert membership.DOWN_MS == 60_000
    assert "down for more than a minute" in " ".join(page(MACHINES).split())


def test_the_api_page_lists_exactly_the_calls_that_there_are() -> None:
    told = [
        (inline(row["call"])[0], row["role"], inline(row["query"]))
        for row in table("docs/api.md", "call", "role")
    ]
    assert told == [
        (f"{call.method} {call.path}", "—" if call.open else call.role,
         [query.name for query in call.query])
        for call in server.CALLS
    ]


# -- packages -------------------------------------------------------------------------------------

PROJECT = tomllib.loads(page("pyproject.toml"))["project"]


def _names(requirements: list[str]) -> list[str]:
    return [re.split(r"[=<>~!]", one)[0] for one in requirements]


def test_dependencies_are_exactly_those_of_the_project_in_the_installed_versions() -> None:
    rows = table("docs/dependencies.md", "package", "version")
    told = {inline(row["package"])[0]: row["version"] for row in rows}
    assert list(told) == _names(PROJECT["dependencies"])
    lock = page("requirements.lock")
    for package, version in told.items():
        assert metadata.version(package) == version
        assert f"{package}=={version}" in lock


def test_packages_for_tests_are_exactly_those_of_the_project() -> None:
    rows = table("docs/dependencies.md", "package", "why", "## For tests and checks")
    told = [name for row in rows for name in inline(row["package"])]
    assert sorted(told) == sorted(_names(PROJECT["optional-dependencies"]["dev"]))


def test_debian_packages_are_those_that_are_installed() -> None:
    rows = table("docs/dependencies.md", "package", "why", "## Debian packages")
    told = [name for row in rows for name in inline(row["package"])]
    (packages,) = re.findall(r"^PACKAGES := (.+)$", page("Makefile"), re.MULTILINE)
    assert sorted(told) == sorted(packages.split())


def test_a_package_is_imported_through_its_door_alone() -> None:
    modules = {
        "python-hcl2": "hcl2", "lark": "lark", "dulwich": "dulwich", "pysyncobj": "pysyncobj",
        "starlette": "starlette", "uvicorn": "uvicorn", "python-multipart": "python_multipart",
        "httpx": "httpx", "grpcio": "grpc", "watchfiles": "watchfiles",
        "apscheduler": "apscheduler", "click": "click", "rich": "rich", "dnspython": "dns",
        "cryptography": "cryptography", "pyroute2": "pyroute2",
    }
    for row in table("docs/dependencies.md", "package", "version"):
        module = modules.get(inline(row["package"])[0])
        if module is None:
            continue
        doors = inline(row["door"])
        pattern = re.compile(rf"^\s*(?:from|import) {module}\b", re.MULTILINE)
        for path in (ROOT / "reconciler").rglob("*.py"):
            where = str(path.relative_to(ROOT))
            if pattern.search(path.read_text()):
                assert where.startswith(tuple(doors)), f"{where} imports {module}; doors: {doors}"


# -- the systemd unit -----------------------------------------------------------------------------


def test_the_systemd_unit_verifies() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed here")
    command = re.findall(r"^ExecStart=(.+)$", page("docs/mill.service"), re.MULTILINE)
    assert command == ["/usr/bin/env /opt/mill/.venv/bin/mill agent"]
    done = subprocess.run(["systemd-analyze", "verify", str(ROOT / "docs/mill.service")],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mill.service" not in done.stderr


@pytest.mark.parametrize("line", [
    "KillMode=process", "Delegate=yes", "Restart=on-failure", "After=network-online.target",
])
def test_the_systemd_unit_leaves_containers_running_and_comes_back(line: str) -> None:
    assert any(one.startswith(line) for one in page("docs/mill.service").split("\n"))


@pytest.mark.parametrize("path", ["docs/operations.md", "docs/mill.service"])
def test_it_is_said_that_the_unit_never_ran(path: str) -> None:
    assert "never ran" in page(path)
