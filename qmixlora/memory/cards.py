"""Cards: consumer cards by name, and the one at hand."""

from __future__ import annotations

import math

import torch

from qmixlora.device import GIB
from qmixlora.errors import UserError, did_you_mean

CONTEXT = GIB // 2  # of a CUDA process, beside its tensors; assumed (an H100 took 640 MiB)
KEPT = 0.025  # of a card: the driver keeps 1.5 to 3 % of the memory that is printed on the box
CARDS = {  # GiB, as printed on the box
    "rtx3050-6gb": 6,
    "rtx3050-8gb": 8,
    "rtx3060-12gb": 12,
    "rtx3070-8gb": 8,
    "rtx3080-10gb": 10,
    "rtx3090-24gb": 24,
    "rtx4060-8gb": 8,
    "rtx4060ti-16gb": 16,
    "rtx4070-12gb": 12,
    "rtx4080-16gb": 16,
    "rtx4090-24gb": 24,
    "rtx5060ti-16gb": 16,
    "rtx5070-12gb": 12,
    "rtx5080-16gb": 16,
    "rtx5090-32gb": 32,
}


def card_bytes(name: str) -> int:
    """The memory of a card that the driver hands out, in bytes. Raises UserError for a card that is not in the list."""
    if name not in CARDS:
        raise UserError(
            f"There is no card {name!r} in the list.{did_you_mean(name, CARDS, cutoff=0.4)}",
            where="--card",
            fix=f"Give its memory with --vram GB, or one of: {', '.join(CARDS)}.",
        )
    return int(CARDS[name] * GIB * (1 - KEPT))


def card_size(name: str | None, vram: float | None) -> int | None:
    """The memory of a card of so many GB (of 2^30 bytes), or else of this name, in bytes; None where neither is said.
    Raises UserError as `card_bytes`, and for what is no size.
    """
    if vram is None:
        return card_bytes(name) if name else None
    if not math.isfinite(vram * GIB):
        raise UserError(f"No card has {vram:g} GB.", where="--vram", fix="Give its memory, such as 12.")
    return int(vram * GIB)


def card_at_hand() -> int | None:
    """The memory of the GPU at hand that this process can take (a desktop takes some), in bytes; None without one.

    To ask the driver makes the process' context, so that what it tells is free beside it; plans count it themselves.
    """
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return int(min(free + CONTEXT, total))
