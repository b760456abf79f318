"""The share of padding in batches of samples of some lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Padding:
    """Padding as a share of all tokens in batches of `batch_size`, shuffled and by length (`data.group_by_length`)."""

    batch_size: int
    shuffled: float
    by_length: float


def padding_of(lengths: Sequence[int], batch_size: int) -> Padding:
    """The padding of samples of these lengths, which may be drawn from more."""
    from transformers.trainer_pt_utils import get_length_grouped_indices  # heavy, and seldom asked for

    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    by_length = get_length_grouped_indices(list(lengths), batch_size, generator=generator)
    return Padding(
        batch_size, *(_share([lengths[index] for index in order], batch_size) for order in (shuffled, by_length))
    )


def _share(lengths: Sequence[int], batch_size: int) -> float:
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(lengths) / padded
