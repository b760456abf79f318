"""Memory that ran out, on the card or on the host: how it shows, and work that goes on without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache

from . import processes
from .errors import UserError

T = TypeVar("T")
WORDS = (  # of errors that mean exhausted memory, wherever they come from
    "out of memory",  # CUDA, ROCm, bitsandbytes
    "ALLOC_FAILED",  # handles of cuBLAS and cuDNN
    "CUBLAS_STATUS_NOT_INITIALIZED",  # cublasCreate, as often as ALLOC_FAILED
    "can't allocate memory",  # torch's CPU allocator
    "bad_alloc",  # C++
)


class OutOfMemoryInStep(torch.OutOfMemoryError):
    """Memory ran out in one of several processes, in a step that none of them completes."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on the card or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def unless_out_of_memory(work: Callable[[], T]) -> T | None:
    """Do the work and return its result, or None where memory ran out.

    Then everything that it had allocated is free again: its exception ends here, whose frames hold the tensors of the
    step.

    Raises:
        UserError: memory ran out in one of several processes, and the others do not know.
    """
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if processes.are_several() and not isinstance(error, OutOfMemoryInStep):
            raise UserError(
                f"Memory ran out in process {processes.rank()} outside of a training step.",
                where=f"{processes.count()} processes",
                fix="`qmixlora plan` says what takes less memory. (Levers are pulled for the training step alone where "
                "there are several processes.)",
            ) from None
    clear_device_cache(garbage_collection=True)
    return None
