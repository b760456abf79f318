"""Plans side by side: they compute in Python alone, on one core each."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, cast

import torch

T = TypeVar("T")
_work: Sequence[Callable[[], object]] = ()


def side_by_side(
    work: Sequence[Callable[[], T]], on_progress: Callable[[int, int], None] = lambda done, of: None
) -> list[T]:
    """The results of some functions, in their order, from forked processes (as torch's data loader forks its own).

    One after another where there is one core, no fork, or a device beside the CPU: autograd has a thread for every such
    device from its first backward pass on, and refuses to work in processes that are forked later. `on_progress` is
    told how many are done, and of how many.

    Exceptions are raised here.
    """
    global _work
    processes = min(len(work), os.cpu_count() or 1)
    if processes < 2 or "fork" not in multiprocessing.get_all_start_methods() or torch.accelerator.is_available():
        return list(_counted((function() for function in work), len(work), on_progress))
    _work = work  # the processes inherit it; functions cannot be sent
    try:
        with multiprocessing.get_context("fork").Pool(processes, _begin) as pool:
            results = cast(Iterator[T], pool.imap(_run, range(len(work))))
            return list(_counted(results, len(work), on_progress))
    finally:
        _work = ()


def _counted(results: Iterator[T], count: int, on_progress: Callable[[int, int], None]) -> Iterator[T]:
    on_progress(0, count)
    for done, result in enumerate(results, start=1):
        on_progress(done, count)
        yield result


def _begin() -> None:
    """Prepare a forked process: one core, and no search for garbage among what it was forked with, which copies it."""
    torch.set_num_threads(1)
    gc.freeze()


def _run(index: int) -> object:
    return _work[index]()
