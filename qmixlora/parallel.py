"""Work side by side, in forked processes: plans and looks at data compute in Python alone, on one core each."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.pool import IMapIterator
from multiprocessing.process import BaseProcess
from typing import TypeVar, cast

import torch

from .errors import UserError

T = TypeVar("T")
LOOK = 1.0  # seconds between looks at whether all processes live
ENDS = (signal.SIGTERM, signal.SIGINT)
_work: Sequence[Callable[[], object]] = ()


def side_by_side(
    work: Sequence[Callable[[], T]], on_progress: Callable[[int, int], None] = lambda done, of: None
) -> list[T]:
    """The results of some functions, in their order, from forked processes (as torch's data loader forks its own).

    One after another where there is one core or no fork, or where a library refuses to work in a forked process:
    autograd has a thread for every device beside the CPU, so that it does once it has run in this one,
    and CUDA does not work in one. `on_progress` is told how many are done, and of how many.

    Exceptions are raised here, as RuntimeError with their name and text where they cannot be pickled.

    Raises UserError where the system has ended one of the processes.
    """
    processes = min(len(work), usable_cores())
    if processes > 1 and can_fork():
        with contextlib.suppress(ForkRefusedError):
            return _forked(work, processes, on_progress)
    return list(_counted((function() for function in work), len(work), on_progress))


def in_chunks(
    function: Callable[[range], T],
    count: int,
    size: int,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[T]:
    """The results of a function for the numbers below `count`, `size` of them at a time, as `side_by_side`; progress is
    told in numbers.
    """
    chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    return side_by_side(
        [partial(function, chunk) for chunk in chunks], lambda done, of: on_progress(min(done * size, count), count)
    )


def can_fork() -> bool:
    """Whether this process may fork others: not on every system, and not one that was forked as a helper itself."""
    return "fork" in multiprocessing.get_all_start_methods() and not multiprocessing.current_process().daemon


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ForkRefusedError(Exception):
    """A library does not work in a process that was forked."""


def _forked(work: Sequence[Callable[[], T]], processes: int, on_progress: Callable[[int, int], None]) -> list[T]:
    global _work
    _work = work  # the processes inherit it; functions cannot be sent
    try:
        with contextlib.ExitStack() as stack:
            others = multiprocessing.active_children()
            with _held_back():
                pool = stack.enter_context(multiprocessing.get_context("fork").Pool(processes, _begin))
            helpers = [process for process in multiprocessing.active_children() if process not in others]
            results = _while_alive(pool.imap(_run, range(len(work))), helpers)
            return list(_counted(cast(Iterator[T], results), len(work), on_progress))
    finally:
        _work = ()


def _while_alive(results: IMapIterator[bytes], helpers: Sequence[BaseProcess]) -> Iterator[object]:
    """The results, as long as all processes live: a pool puts another into a dead one's place, and waits for ever for
    what that one had been given.
    """
    while True:
        try:
            result = results.next(timeout=LOOK)
        except StopIteration:
            return
        except multiprocessing.TimeoutError:
            codes = [process.exitcode for process in helpers if process.exitcode is not None]
            if codes:
                raise UserError(
                    f"A process that helped here was ended from outside (exit code {codes[0]}).",
                    fix="That is what a system does where memory runs out: have more of it free.",
                ) from None
        else:
            yield pickle.loads(result)


def _counted(results: Iterator[T], count: int, on_progress: Callable[[int, int], None]) -> Iterator[T]:
    on_progress(0, count)
    for done, result in enumerate(results, start=1):
        on_progress(done, count)
        yield result


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Have signals that end a process wait, here and in processes that are forked meanwhile, until `_begin`.

    One that comes to a forked process before Python is ready in it sets a flag that Python clears then: it would be
    lost, and whoever ends the process would wait for ever.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    """Prepare a forked process: one core, and no search for garbage among what it was forked with, which copies it.

    It ends by signals as if nobody had asked for them: a handler of Python's that it was forked with would not run
    while the process waits for work, if the signal came just before, and whoever ends it would wait for ever. Ctrl-C
    reaches all processes of a terminal, and the one that forked them ends them.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
    torch.set_num_threads(1)
    gc.freeze()


def _run(index: int) -> bytes:
    """The pickled result, unpickled by who waits for it: the pool's own thread ends where it cannot unpickle, and all
    wait for ever.
    """
    try:
        return pickle.dumps(_work[index]())
    except Exception as error:
        if isinstance(error, RuntimeError) and "fork" in str(error):
            # autograd: "fork-based multiprocessing"; CUDA: "in forked subprocess"
            raise ForkRefusedError(str(error)) from None
        if not _can_be_sent(error):
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        raise


def _can_be_sent(error: Exception) -> bool:
    """Whether an exception is the same after pickling: not where its class asks for more than `args` hold."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # of any kind: the code is the class' own
        return False
    return True
