"""The device at hand, and the memory that it has taken."""

from __future__ import annotations

import resource

import torch

GIB = 2**30  # bytes; every size in a message is in these


def default_device() -> torch.device:
    """The first GPU, or the CPU where there is none."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def peak_memory_gib() -> float:
    """Peak memory of this process so far: reserved on the GPU, or resident where there is none (GiB)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
