"""iproute2 and nftables as child processes with a deadline; what they say becomes an error."""

from __future__ import annotations

import asyncio
import re
from typing import TypeVar

import msgspec

from reconciler.executor.containerd.network_namespace import NetworkFailed

COMMAND_DEADLINE_S = 20.0  # `ip` takes milliseconds; only a wedged kernel lock reaches this

_Row = TypeVar("_Row")


class DeviceMissing(NetworkFailed):
    """`ip` named a device that is not there."""


async def ip(name: str | None, *lines: str) -> None:
    """Run lines of `ip` as one batch; a link that exists already is fine.

    name: the namespace; None is the caller's own. Errors: DeviceMissing, NetworkFailed.
    """
    await batch("ip", name, *lines)


async def batch(program: str, name: str | None, *lines: str) -> None:
    """Like `ip`, for any program of iproute2 (`bridge`)."""
    if lines:
        await run(program, *_inside(name), "-force", "-batch", "-", lines=lines)


async def show(row: type[_Row], program: str, name: str | None, *what: str) -> list[_Row]:
    """The rows that `ip` or `bridge` prints as JSON; give fields defaults, they print `{}` too."""
    shown = await run(program, *_inside(name), "-details", "-json", *what)
    return msgspec.json.decode(shown or "[]", type=list[row])  # type: ignore[valid-type]  # a variable


async def delete_link(name: str | None, link: str) -> None:
    """Delete a link; none is fine."""
    try:
        await ip(name, f"link del {link}")
    except DeviceMissing:
        return


async def run(*command: str, lines: tuple[str, ...] = ()) -> str:
    """What `command` prints. Errors: NetworkFailed, also where the program is not installed."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except FileNotFoundError as error:
        hint = "install the packages iproute2 and nftables"
        raise NetworkFailed(f"no program {command[0]!r} on PATH", hint=hint) from error
    try:
        async with asyncio.timeout(COMMAND_DEADLINE_S):
            out, err = await process.communicate("".join(f"{line}\n" for line in lines).encode())
    except TimeoutError as error:
        process.kill()
        await process.wait()
        raise NetworkFailed(f"{command[0]} did not answer", at=" ".join(command)) from error
    if process.returncode:
        _raise_unless_it_exists(err.decode(errors="replace"), command, lines)
    return out.decode()


def _inside(name: str | None) -> tuple[str, ...]:
    return () if name is None else ("-n", name)


def _raise_unless_it_exists(err: str, command: tuple[str, ...], lines: tuple[str, ...]) -> None:
    """`ip -force -batch` tells each failure as reason lines and then `Command failed -:N`."""
    at = command[2] if "-n" in command else " ".join(command)
    reasons: list[str] = []
    for told in err.splitlines():
        failed = re.match(r"Command failed -:(\d+)", told)
        if not failed:
            reasons.append(told)
            continue
        line = lines[int(failed[1]) - 1]
        if not (line.startswith("link add ") and any("File exists" in why for why in reasons)):
            why = "; ".join(reasons) or told
            kind = DeviceMissing if "Cannot find device" in why else NetworkFailed
            raise kind(f"{command[0]} {line!r}: {why}", at=at)
        reasons = []
    if reasons:
        raise NetworkFailed("; ".join(reasons), at=at)
