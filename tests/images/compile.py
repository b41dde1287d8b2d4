"""The static server, compiled by what a Debian 12 offers.

tcc links glibc statically only in vain ("Unknown relocation type for got: 23"), musl it does. The
package musl-dev would install all of gcc with it, so it is downloaded and unpacked, not installed.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("server.c")
_DEADLINE_S = 120


@functools.cache
def compile_server() -> bytes:
    """The program: with tcc and musl (84 KB), or else with gcc and glibc (1 MB).

    Needs Debian's `tcc`, or `gcc` and `libc6-dev`; says so where neither works.
    """
    reasons = []
    for way in (with_tcc, with_gcc):
        try:
            return way()
        except (OSError, subprocess.SubprocessError) as error:
            told = getattr(error, "stderr", None) or b""
            reasons.append(f"{way.__name__}: {error} {told.decode(errors='replace')[-300:]}")
    raise RuntimeError("no static C compiler: apt-get install tcc. " + "; ".join(reasons))


def with_tcc() -> bytes:
    """Compiled by tcc against Debian's musl."""
    if shutil.which("tcc") is None:
        raise FileNotFoundError("tcc is not installed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _run("apt-get", "download", "-q", "musl-dev", folder=folder)
        (package,) = folder.glob("musl-dev_*.deb")
        _run("dpkg-deb", "-x", str(package), "musl", folder=folder)
        (libc,) = folder.glob("musl/usr/lib/*/libc.a")
        lib, include = libc.parent, folder / "musl/usr/include" / libc.parent.name
        start, end = [str(lib / "crt1.o"), str(lib / "crti.o")], [str(libc), str(lib / "crtn.o")]
        flags = ["-nostdinc", "-nostdlib", "-static", f"-I{include}"]
        _run("tcc", *flags, "-o", "server", *start, str(SOURCE), *end, folder=folder)
        return (folder / "server").read_bytes()


def with_gcc() -> bytes:
    """Compiled by gcc against glibc."""
    with tempfile.TemporaryDirectory() as name:
        flags = ["-static", "-O2", "-s", "-Wall", "-Wextra", "-Werror"]
        _run("gcc", *flags, "-o", "server", str(SOURCE), folder=Path(name))
        return (Path(name) / "server").read_bytes()


def _run(*command: str, folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=_DEADLINE_S)
