"""The share of padding in batches of samples of some lengths, and how many batches they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qmixlora.data.rendering.token_batches import longest_first, token_batches
from qmixlora.recipe import Train


@dataclass(frozen=True)
class Padding:
    """Padding as a share of all tokens in batches of `batch_size`, shuffled, and by `data.group_by_length`: `step` or
    true; with `train.batch_tokens`, in batches of so many tokens, and the samples that such a batch has on average.
    """

    batch_size: int
    shuffled: float
    by_step: float
    by_length: float
    batch_tokens: int | None = None
    by_tokens: float | None = None
    samples_by_tokens: float | None = None

    @property
    def samples_of_a_batch(self) -> float:
        """The samples of a micro-batch, on average where they are filled by tokens."""
        return self.samples_by_tokens or self.batch_size


def padding_of(lengths: Sequence[int], spec: Train) -> Padding:
    """The padding of samples of these lengths, which may be drawn from more, as a run makes batches of them."""
    from transformers.trainer_pt_utils import get_length_grouped_indices  # heavy, and seldom asked for

    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    by_length = get_length_grouped_indices(list(lengths), spec.micro_batch_size, generator=generator)
    by_step = list(longest_first(shuffled, spec.micro_batch_size * spec.gradient_accumulation, lengths))
    one, two, three = (_share(lengths, _cut(order, spec.micro_batch_size)) for order in (shuffled, by_step, by_length))
    if spec.batch_tokens is None:
        return Padding(spec.micro_batch_size, one, two, three)
    batches = token_batches(lengths, spec.batch_tokens)
    share, samples = _share(lengths, batches), len(lengths) / len(batches)
    return Padding(spec.micro_batch_size, one, two, three, spec.batch_tokens, share, samples)


def _cut(order: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    padded = sum(max(lengths[index] for index in batch) * len(batch) for batch in batches)
    return 1 - sum(lengths) / padded
