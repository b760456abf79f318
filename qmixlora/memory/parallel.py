"""Plans side by side: they compute in Python alone, on one core each."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")
_work: Sequence[Callable[[], object]] = ()


def side_by_side(work: Sequence[Callable[[], T]]) -> list[T]:
    """The results of some functions, in their order, from forked processes (as torch's data loader forks its own); one
    after another where there is one core, or no fork.

    Exceptions are raised here.
    """
    global _work
    processes = min(len(work), os.cpu_count() or 1)
    if processes < 2 or "fork" not in multiprocessing.get_all_start_methods():
        return [function() for function in work]
    _work = work  # the processes inherit it; functions cannot be sent
    try:
        with multiprocessing.get_context("fork").Pool(processes, torch.set_num_threads, (1,)) as pool:
            return pool.map(_run, range(len(work)), chunksize=1)  # type: ignore[arg-type]
    finally:
        _work = ()


def _run(index: int) -> object:
    return _work[index]()
