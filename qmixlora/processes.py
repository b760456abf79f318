"""What the processes of a run share (`accelerate launch`, `qmixlora train --processes N`), beside what accelerate does.

Process 0 is the main one: it alone writes and speaks. A process that was started alone is its own main process, and all
functions here cost it nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, distributed

from .device import default_device
from .launch import is_launched, processes_here
from .parallel import usable_cores

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # with the main process, which looks at all the data and computes features alone
PRECEDENCE = timedelta(seconds=2)  # of the main process in telling what all processes know
BUCKET = 2**26  # bytes that are added up at a time
TOLD = "qmixlora/told"
PLUGINS = ("FSDP", "DEEPSPEED", "MEGATRON_LM")

_asked_for: set[str] = set()


class EndedElsewhere(SystemExit):
    """Another process of the run says why it ends."""


def are_several() -> bool:
    """Whether this process has joined others."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def count() -> int:
    """The number of processes in the run."""
    return distributed.get_world_size() if are_several() else 1


def rank() -> int:
    """The number of this process in the run."""
    return distributed.get_rank() if are_several() else 0


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def are_sharded() -> bool:
    """Whether accelerate was asked for FSDP: then frozen weights lie in shares, and all processes work in step."""
    return are_several() and "FSDP" in _asked_for


def asked_for() -> frozenset[str]:
    """The plugins of accelerate that the launcher was asked for."""
    return frozenset(_asked_for)


def join() -> None:
    """Meet the processes that a launcher has started beside this one, if there are any.

    accelerate's own plugins are switched off, and so is its mixed precision: what is computed in which precision, the
    recipe says.
    """
    for plugin in PLUGINS:
        if os.environ.pop(f"ACCELERATE_USE_{plugin}", "false").lower() == "true":
            _asked_for.add(plugin)
    if is_launched() and not are_several():
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
        if "OMP_NUM_THREADS" not in os.environ:
            os.environ["OMP_NUM_THREADS"] = str(max(1, usable_cores() // processes_here()))
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        if not torch.cuda.is_available():
            os.environ["ACCELERATE_USE_CPU"] = "true"  # else accelerate takes every process for the only one
        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        distributed.barrier()  # one that fails and ends must not be missed by those who are still looking for it


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes for a block. What is printed in it, the main process prints.

    An exception that ends it is raised in one process, the main one if it has it too; others that end raise
    EndedElsewhere, whose exit code is the same.
    """
    join()
    if not are_several():
        yield
        return
    streams = sys.stdout, sys.stderr
    try:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123  # no file of anybody's
            if not is_main():
                sys.stdout = sys.stderr = nowhere
            try:
                yield
            finally:
                sys.stdout, sys.stderr = streams
    except EndedElsewhere:
        raise
    except BaseException as error:
        if _may_tell():
            raise
        raise EndedElsewhere(getattr(error, "exit_code", 1)) from None
    distributed.barrier()
    distributed.destroy_process_group()


def _may_tell() -> bool:
    """Whether no other process has said why the run ends. (Where its memory is gone, so is the process that had it.)"""
    store = distributed.distributed_c10d._get_default_store()
    with suppress(RuntimeError):
        if not is_main():
            with suppress(RuntimeError):
                store.wait([TOLD], PRECEDENCE)
        mine = str(rank())
        return bool(store.compare_set(TOLD, "", mine).decode() == mine)
    return False


def from_main(work: Callable[[], T]) -> T:
    """What some work gives in the main process, which alone does it, in all of them.

    An exception is raised there alone, and the others raise EndedElsewhere.
    """
    if not are_several():
        return work()
    told: list[Any] = [None, None]
    if is_main():
        try:
            told[0] = work()
        except BaseException as error:
            told[1] = getattr(error, "exit_code", 1)
            raise
        finally:
            distributed.broadcast_object_list(told, src=0)
    else:
        distributed.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise EndedElsewhere(told[1])
    result: T = told[0]
    return result


def main_first(work: Callable[[], T]) -> T:
    """Do some work in every process, in the others when the main one is done: what it has kept, they need not do."""
    done: list[T] = []
    from_main(lambda: done.append(work()))
    return done[0] if done else work()


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if are_several():
        distributed.barrier()


def largest(numbers: Sequence[float]) -> list[float]:
    """The largest of each number over all processes."""
    return _reduced(numbers, distributed.ReduceOp.MAX) if are_several() else list(numbers)


def total(number: float) -> float:
    """The sum of a number over all processes."""
    return _reduced([number], distributed.ReduceOp.SUM)[0] if are_several() else number


def gathered(items: Sequence[T]) -> list[T]:
    """The items of all processes, in the order of the processes."""
    if not are_several():
        return list(items)
    parts: list[Any] = [None] * count()
    distributed.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by their sums over all processes, in place; every process has the same shapes."""
    if not are_several():
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for own in kinds.values():
        for bucket in _buckets(own):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            distributed.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))


def as_in_main(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by those of the main process, in place."""
    if are_several():
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(own.nbytes for own in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _reduced(numbers: Sequence[float], operation: Any) -> list[float]:
    values = torch.tensor(numbers, dtype=torch.float64).to(default_device())
    distributed.all_reduce(values, op=operation)
    return [float(value) for value in values.tolist()]
