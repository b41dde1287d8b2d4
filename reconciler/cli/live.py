"""A deploy on a terminal: the transcript's lines above, what is under way below, drawn over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from reconciler.cli.problems import shown
from reconciler.cli.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from reconciler.api.client import DeployEvent

Draw = Callable[["DeployEvent", list[str]], None]
SAID = "    "
"""How a line of a container begins in what `render` gives."""

REDRAWS_PER_S = 10


def plain(_event: DeployEvent, lines: list[str]) -> None:
    """Off a terminal: the lines of the transcript as they come. What a container said last is no
    line of it, and goes beside it to standard error."""
    for line in lines:
        click.echo(line, err=line.startswith(SAID))


@contextlib.contextmanager
def screen(settings: Settings) -> Iterator[Draw]:
    """How events are shown: plainly, or on a terminal over a live view that ends in the same."""
    if not settings.live:
        yield plain
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(no_color=not settings.color, highlight=False, soft_wrap=True)
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=30),
        TextColumn("{task.fields[figure]}", markup=False), TimeElapsedColumn(),
        console=console, transient=True, refresh_per_second=REDRAWS_PER_S,
    )
    with progress:
        yield View(console, progress).draw


class View:
    """The bars of the pulls and of the allocations that are not healthy yet."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console = console
        self._progress = progress
        self._bars: dict[str, TaskID] = {}

    def draw(self, event: DeployEvent, lines: list[str]) -> None:
        """Print what stays, and move what is under way."""
        from rich.text import Text

        for line in lines:
            self._console.print(Text(line, _style(line)))
        step = event.step
        match step.phase:
            case "pulling" if step.image:
                self._pull(f"{step.image} on {step.node}", step.bytes, step.total)
            case "pulled" if step.image:
                self._end(f"{step.image} on {step.node}")
            case "pulled":
                self._end_all()
            case "starting":
                self._bar(f"{step.service} on {step.node}: starting", step.alloc)
            case "healthy" if step.alloc:
                self._end(step.alloc)
            case "rolling_back":
                self._end_all()
                self._bar(f"rolling back: {step.reason}", "rollback")
            case _:
                if event.terminal:
                    self._end_all()

    def _pull(self, what: str, done: int | None, total: int | None) -> None:
        figure = f"{(done or 0) / 1e6:.1f}/{(total or 0) / 1e6:.1f} MB" if total else ""
        self._progress.update(self._bar(f"pulling {what}", what), completed=done or 0,
                              total=total or None, figure=figure)

    def _bar(self, text: str, key: str) -> TaskID:
        if key not in self._bars:
            self._bars[key] = self._progress.add_task(f"  {shown(text)}", total=None, figure="")
        return self._bars[key]

    def _end(self, key: str) -> None:
        if key in self._bars:
            self._progress.remove_task(self._bars.pop(key))

    def _end_all(self) -> None:
        for key in list(self._bars):
            self._end(key)


def _style(line: str) -> str:
    if " failed: " in line or line.startswith("  rollback failed"):
        return "red"
    if line.startswith(("  warning:", "  rolling back", "  rolled back", "  cancelled")):
        return "yellow"
    return "green" if line.startswith("  deployed") else ""
