"""The device at hand, and the memory that it has taken."""

from __future__ import annotations

import platform
import sys
from functools import cache

import psutil
import torch

from .launch import local_rank

GIB = 2**30  # bytes; every size in a message is in these


def in_words(size: float) -> str:
    """A size in bytes for people: GiB, or MiB where it is less than one."""
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB else f"{size / 2**20:.0f} MiB"


def default_device() -> torch.device:
    """The GPU of this process (the first, unless a launcher has started several), ready to be used; or the CPU where
    there is none.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    prepare_card()
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def free_memory() -> int:
    """The memory that another model could take, in bytes: of the GPU, or of the host where there is none."""
    if not torch.cuda.is_available():
        return int(psutil.virtual_memory().available)
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(torch.cuda.mem_get_info()[0]) + unused


def make_room() -> None:
    """Free what earlier models of this process still hold on the GPU at hand, and have it ready for the next one.

    A model that nobody uses any more is garbage with cycles. Python searches for such garbage when many new objects
    have been made, not when a card is full, and torch's allocator does not ask for it.
    """
    if torch.cuda.is_available():
        from accelerate.utils.memory import clear_device_cache  # an import that others need not wait for

        prepare_card()
        clear_device_cache(garbage_collection=True)


@cache
def prepare_card() -> None:
    """Have torch's allocator work on the GPU at hand, once; does nothing without one.

    Where expandable segments fail at the first allocation (some drivers under WSL) they are switched off. Where the
    driver would spill into host memory without a word (Windows, WSL) the allocator is held to the memory that is free
    now, so that running out of it raises.
    """
    if not torch.cuda.is_available():
        return
    try:
        torch.empty(2**20, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")
    if spills():
        free, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(free / total)


def spills() -> bool:
    """Whether the driver moves memory to the host where the card is full: on Windows, and under WSL."""
    return sys.platform == "win32" or "microsoft" in platform.uname().release.lower()


def reset_peak_memory() -> None:
    """Forget the peak of an earlier attempt on the GPU. (The resident peak of a process cannot be reset.)"""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gib() -> float:
    """Peak memory since `reset_peak_memory`: reserved on the GPU, or resident where there is none (GiB)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / GIB
    return _peak_resident() / GIB


def _peak_resident() -> int:
    try:
        import resource
    except ImportError:  # Windows
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
