"""What a verb shows: stages with a progress bar for people, one JSON object as the last line for programs."""

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, Literal

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Output = Literal["text", "json"]
_PLAIN_LINE_EVERY_S = 20.0
_LOG_WIDTH = 200


class _Terminal(RichConsole):
    """Rich's own ends the process with 1, and without a word, when nobody reads any more: a stage would not say why."""

    def on_broken_pipe(self) -> None:
        """Shown nothing more; whoever printed is told, as of a disk that is full."""
        self.quiet = True
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class StageBar:
    """Progress of one stage. On a terminal a bar that moves; in a log a line now and then."""

    def __init__(self, console: RichConsole, name: str) -> None:
        self._console, self._name = console, name
        self._begun = self._said = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn(f"[bold]{name:<11}[/bold]"),
                BarColumn(bar_width=28),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=None)
            self._bar.start()

    def update(self, what: str, done: float | None = None, total: float | None = None) -> None:
        """Say what is going on and how far it is."""
        if self._bar is not None:
            # A bar over zero things would show as done; None shows as "working".
            self._bar.update(self._task, description=escape(what), completed=done or 0, total=total or None)
        elif time.monotonic() - self._said > _PLAIN_LINE_EVERY_S:
            self._said = time.monotonic()
            share = f" {100 * done / total:.0f} %" if done is not None and total else ""
            self._console.print(f"  {self._name}{share}: {escape(what)}", highlight=False)

    def close(self) -> float:
        """Remove the bar; seconds since the stage began."""
        if self._bar is not None:
            self._bar.stop()
        return time.monotonic() - self._begun


class Console:
    """Where a verb prints. With `output="json"` people's lines go to stderr and the result to stdout."""

    def __init__(self, output: Output = "text") -> None:
        self.output = output
        self.rich = _Terminal(stderr=output == "json", highlight=False, soft_wrap=True, emoji=False)
        if not self.rich.is_terminal:
            self.rich.width = _LOG_WIDTH  # a log is as wide as its lines: no column of a table is cut

    def print(self, text: str = "") -> None:
        """A line; rich markup is interpreted."""
        self.rich.print(text)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[StageBar]:
        """A stage that runs; its caller prints the outcome with `done`."""
        bar = StageBar(self.rich, name)
        try:
            yield bar
        finally:
            bar.close()

    def done(self, name: str, text: str, seconds: float | None = None) -> None:
        """One line for a finished stage."""
        took = f" [dim]{seconds:.0f} s[/dim]" if seconds is not None else ""
        self.rich.print(f"[green]✓[/green] [bold]{name:<11}[/bold] {text}{took}")

    def stopped(self, name: str) -> None:
        """One line for a stage that did not get to its end; where nobody reads, that is what ended it still."""
        with contextlib.suppress(OSError):
            self.rich.print(f"[red]✗[/red] [bold]{name:<11}[/bold] [dim]stopped[/dim]")

    def skipped(self, name: str, text: str) -> None:
        """One line for a stage whose inputs have not changed."""
        self.rich.print(f"[dim]–[/dim] [bold]{name:<11}[/bold] {text} [dim](unchanged, skipped)[/dim]")

    def left_out(self, name: str, why: str) -> None:
        """One line for a stage that such a run does not have."""
        self.rich.print(f"[dim]–[/dim] [bold]{name:<11}[/bold] {why}")

    def result(self, value: dict[str, Any]) -> None:
        """The verb's result, as the last line of stdout, if JSON was asked for."""
        if self.output == "json":
            self.rich.file.flush()
            sys.stdout.write(json.dumps(value) + "\n")
            sys.stdout.flush()
