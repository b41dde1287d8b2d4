"""What leader and agent say to each other: orders down, reports up, msgpack over one gRPC stream.

Orders are idempotent and named by allocation; reports say what is, not what was done. A secret
travels sealed, and is opened by the agent in memory for a start or a pull.
"""

from __future__ import annotations

from typing import Literal

import msgspec

SERVICE = "mill.agent.v1.Agent"
SESSION = "Session"
LOGS = "Logs"
MAX_MESSAGE_BYTES = 16 << 20


class Sealed(msgspec.Struct, frozen=True, tag="sealed"):
    """One sealed secret value."""

    name: str
    nonce: bytes
    sealed: bytes


class Plain(msgspec.Struct, frozen=True, tag="plain"):
    """A piece of text."""

    text: str


Piece = Plain | Sealed


class Env(msgspec.Struct, frozen=True):
    """One environment variable, its value in pieces."""

    key: str
    value: tuple[Piece, ...]


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """How an allocation proves that it serves."""

    kind: Literal["http", "tcp", "command", "running"]
    path: str = ""
    command: tuple[str, ...] = ()
    interval_ms: int = 10_000
    timeout_ms: int = 2_000
    healthy: int = 1
    unhealthy: int = 3
    deadline_ms: int = 60_000
    eager_ms: int = 3_000


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The first message of a session: who leads, in which term."""

    term: int
    leader: str


class Pull(msgspec.Struct, frozen=True, tag="pull", kw_only=True):
    """Have this image, pinned to its digest."""

    term: int
    image: str
    digest: str
    auth: Sealed | None = None


class Start(msgspec.Struct, frozen=True, tag="start", kw_only=True):
    """Have this allocation run. `restarts` is the incarnation: a greater one starts it again."""

    term: int
    alloc: str
    service: str
    image: str
    digest: str
    address: str
    probe: Probe
    port: int | None = None
    command: tuple[str, ...] | None = None
    entrypoint: tuple[str, ...] | None = None
    user: str = ""
    workdir: str = ""
    read_only: bool = False
    tmpfs: tuple[str, ...] = ()
    env: tuple[Env, ...] = ()
    cpu_milli: int = 250
    memory_bytes: int = 256_000_000
    stop_timeout_ms: int = 10_000
    restarts: int = 0
    auth: Sealed | None = None


class Stop(msgspec.Struct, frozen=True, tag="stop", kw_only=True):
    """Have this allocation gone: TERM, KILL after its stop timeout, network and record removed."""

    term: int
    alloc: str
    kill: bool = False


Order = Hello | Pull | Start | Stop

Phase = Literal["absent", "starting", "running", "exited", "error"]


class AllocReport(msgspec.Struct, frozen=True, tag="alloc", kw_only=True):
    """What an allocation is on this node.

    `healthy` is the probe's verdict: None before the first. `since_start_s` runs from the start of
    this incarnation to the report of its verdict. `error` says why a start failed; `node_fault`
    that another node may do better. `tail` holds the last lines of one that ended.
    """

    alloc: str
    phase: Phase
    restarts: int = 0
    healthy: bool | None = None
    detail: str = ""
    since_start_s: float = 0.0
    exit_code: int | None = None
    oom: bool = False
    error: str = ""
    node_fault: bool = False
    tail: tuple[str, ...] = ()


class PullReport(msgspec.Struct, frozen=True, tag="pull", kw_only=True):
    """How far an image is. `final`: the registry said no, so trying again is no use."""

    image: str
    digest: str
    state: Literal["pulling", "done", "failed"]
    received_bytes: int = 0
    total_bytes: int = -1
    cached: bool = False
    error: str = ""
    final: bool = False


class Beat(msgspec.Struct, frozen=True, tag="beat", kw_only=True):
    """The node lives. `edge_index`: the newest state that its edge serves; `busy`: addresses of
    draining allocations to which it still has requests under way; `log_error`: why its log is
    closed, naming the disk."""

    at_ms: int
    edge_index: int = 0
    edge_error: str = ""
    busy: tuple[str, ...] = ()
    log_error: str = ""


class Inventory(msgspec.Struct, frozen=True, tag="inventory", kw_only=True):
    """Sent at the start of a session: all that is here."""

    node: str
    allocs: tuple[AllocReport, ...] = ()
    images: tuple[tuple[str, str], ...] = ()


Report = AllocReport | PullReport | Beat | Inventory


class LogRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Lines of an allocation: the last `tail`, then, with `follow`, the new ones."""

    alloc: str
    tail: int = 100
    follow: bool = False


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line as it was written; `ts` is RFC 3339 UTC."""

    ts: str
    stream: Literal["stdout", "stderr"]
    line: str


_order_decoder: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_report_decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)
encode = msgspec.msgpack.Encoder().encode


def decode_order(data: bytes) -> Order:
    """An order from its bytes."""
    return _order_decoder.decode(data)


def decode_report(data: bytes) -> Report:
    """A report from its bytes."""
    return _report_decoder.decode(data)
