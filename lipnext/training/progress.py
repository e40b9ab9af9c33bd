"""Progress on standard error: a rich bar on a terminal, plain lines elsewhere; results go elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0


class Reporter(Protocol):
    """Where a long job says how far it is."""

    def advance(self, count: int, note: str = "") -> None:
        """Report `count` more units done."""

    def resume(self, done: int) -> None:
        """Report that `done` units were done in an earlier run; they do not count towards the speed."""

    def line(self, text: str) -> None:
        """Print one lasting line."""


class _Bar:
    def __init__(self, progress: Progress, task: int) -> None:
        self._progress, self._task = progress, task

    def advance(self, count: int, note: str = "") -> None:
        self._progress.update(self._task, advance=count, note=note)  # type: ignore[arg-type]

    def resume(self, done: int) -> None:
        self._progress.reset(self._task, completed=done)  # type: ignore[arg-type]

    def line(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)


class _Lines:
    def __init__(self, title: str, total: int) -> None:
        self._title, self._total = title, total
        self._done = self._first = 0
        self._start = self._last = time.monotonic()

    def advance(self, count: int, note: str = "") -> None:
        self._done += count
        now = time.monotonic()
        if now - self._last < PLAIN_SECONDS:
            return
        self._last = now
        rate = (self._done - self._first) / (now - self._start)
        left = (self._total - self._done) / rate if rate else 0.0
        self.line(f"{self._title} {self._done}/{self._total}, about {left:.0f} s left {note}".rstrip())

    def resume(self, done: int) -> None:
        self._first = self._done = done
        self._start = self._last = time.monotonic()

    def line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def reporter(title: str, total: int) -> Iterator[Reporter]:
    """Show progress of a job of `total` units.

    Yields:
        A reporter: a bar that vanishes at the end on a terminal, else a line every ten seconds.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(title, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bar(progress, progress.add_task(title, total=total, note=""))


class Silent:
    """A reporter for tests and library calls that should print nothing."""

    def advance(self, count: int, note: str = "") -> None:
        """Do nothing."""

    def resume(self, done: int) -> None:
        """Do nothing."""

    def line(self, text: str) -> None:
        """Do nothing."""
