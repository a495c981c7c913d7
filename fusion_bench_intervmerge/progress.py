"""A progress bar for a terminal; nothing at all in a log file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


class Bar:
    """A bar that can be advanced, with a note and a rate in images a second."""

    def __init__(self, progress: Progress, name: str, total: int, done: int):
        self._progress = progress
        self._task = progress.add_task(name, total=total, completed=done, note="")
        self._started, self._images = time.perf_counter(), 0

    def advance(self, count: int, note: str = "", images: int = 0) -> None:
        """Go on by ``count``; ``images`` were seen meanwhile."""
        self._images += images
        if images:
            note += f"  {self._images / (time.perf_counter() - self._started):.0f} images/s"
        self._progress.update(self._task, advance=count, note=note)


@contextmanager
def progress_bar(name: str, total: int, show: bool, done: int = 0) -> Iterator[Bar]:
    """A bar on stderr with what is left to do and how long it will take."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, disable=not (show and console.is_terminal)
    ) as progress:
        yield Bar(progress, name, total, done)
