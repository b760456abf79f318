"""How far long work on data is, and how long it will take: on a terminal's stderr, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import BinaryIO, TypeVar

from rich.console import Console
from rich.progress import Progress, TaskID, track, wrap_file

MANY = 2000  # rows that take long enough
LARGE = 8 << 20  # bytes, likewise
T = TypeVar("T")


@contextmanager
def progress(what: str, count: int) -> Iterator[tuple[Progress, TaskID]]:
    """A bar for so many rows, and its only task."""
    bar = Progress(console=Console(stderr=True), transient=True, disable=not _shows(count, MANY))
    with nullcontext() if bar.disable else bar:  # rich 14.0 ends one that is disabled with an empty line
        yield bar, bar.add_task(what, total=count)


def tracked(rows: Iterable[T], what: str, count: int) -> Iterable[T]:
    """The rows, of which there are so many."""
    console = Console(stderr=True)
    return track(rows, what, count, console=console, transient=True) if _shows(count, MANY) else rows


@contextmanager
def reading(file: BinaryIO, size: int) -> Iterator[BinaryIO]:
    """A file of so many bytes, which is read from its beginning."""
    if not _shows(size, LARGE):
        yield file
        return
    with wrap_file(file, size, description="reading data", console=Console(stderr=True), transient=True) as shown:
        yield shown


def _shows(size: int, least: int) -> bool:
    return size >= least and Console(stderr=True).is_terminal
