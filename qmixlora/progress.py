"""How far long work is, and how long it will take: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .launch import local_rank

SOON, OFTEN, SELDOM = 1.0, 0.1, 30.0  # seconds: before a bar, between its changes, and between lines
Tell = Callable[[int, int], None]  # is told how much is done, and of how much
T = TypeVar("T")


@contextmanager
def progress(what: str, console: Console | None = None, *, in_bytes: bool = False) -> Iterator[Tell]:
    """A function that is told how far work is, for a block. It shows (on stderr, unless a console is given) what lasts
    longer than a moment, by the first of several processes.
    """
    shown = _Shown(what, console or Console(stderr=True), in_bytes)
    try:
        yield shown.tell if local_rank() == 0 else lambda done, of: None
    finally:
        shown.close()


class _Shown:
    def __init__(self, what: str, console: Console, in_bytes: bool) -> None:
        self.what, self.console = what, console
        self.start = self.last = time.monotonic()
        amount = DownloadColumn(binary_units=True) if in_bytes else MofNCompleteColumn()
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            amount,
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self.bar = Progress(*columns, console=console, transient=True)
        self.task: Any = None

    def tell(self, done: int, of: int) -> None:
        now = time.monotonic()
        if now - self.last < (SELDOM if not self.console.is_terminal else SOON if self.task is None else OFTEN):
            return
        self.last = now
        if self.console.is_terminal:
            self._draw(done, of)
        elif 0 < done < of:
            left = (now - self.start) / done * (of - done)
            text = f"  {self.what}: {done / of:.0%}, about {_in_words(left)} left"
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _draw(self, done: int, of: int) -> None:
        if self.task is None:
            self.task = self.bar.add_task(self.what, total=of, completed=done)
            self.bar.start()
        self.bar.update(self.task, completed=done, total=of)

    def close(self) -> None:
        if self.task is not None:  # rich ends a bar that never began with an empty line
            self.bar.stop()


def _in_words(seconds: float) -> str:
    units = ((100, 1, "{:.0f} s"), (6000, 60, "{:.0f} min"), (float("inf"), 3600, "{:.1f} h"))
    unit, words = next((unit, words) for below, unit, words in units if seconds < below)
    return words.format(seconds / unit)


def tracked(rows: Iterable[T], what: str, count: int) -> Iterator[T]:
    """The rows, of which there are so many."""
    with progress(what) as tell:
        for done, row in enumerate(rows):
            tell(done, count)
            yield row


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """A file that is read from its beginning, for a block."""
    with progress(f"reading {path.name}", in_bytes=True) as tell, io.BufferedReader(_ToldFile(path, tell)) as file:
        yield file


class _ToldFile(io.FileIO):
    """A file that tells how much of it was read."""

    def __init__(self, path: Path, tell: Tell) -> None:
        super().__init__(path)
        self.size, self.tell_progress, self.done = path.stat().st_size, tell, 0

    def readinto(self, buffer: Any) -> int | None:
        """Called by the buffer above."""
        count = super().readinto(buffer)
        self.done += count or 0
        self.tell_progress(self.done, self.size)
        return count
