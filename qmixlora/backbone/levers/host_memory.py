"""Host memory for tensors of the card: pinned where that can be had, and without storage for tensors on meta."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pinned_or_pageable(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Empty host memory for a CUDA tensor: pinned, or pageable where the system has no more to pin (WSL limits it).

    A copy from pinned memory may overlap with computing; one from pageable memory is right as well.
    """
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError:  # cudaHostAlloc says "out of memory", which is not the card's
        return torch.empty(shape, dtype=dtype)


def host_like(tensor: Tensor) -> Tensor:
    """A tensor in host memory with this one's numbers; for one on meta, a CPU tensor that takes no memory."""
    if tensor.device.type == "meta":
        return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    return tensor.cpu()
