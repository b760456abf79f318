"""The order in which a run sees its samples, where it is not simply shuffled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from datasets import Dataset
from torch.utils.data import BatchSampler, Sampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from qmixlora.data import lengths_of, longest_first, token_batches
from qmixlora.errors import UserError
from qmixlora.session import TunedSession


class _Seeded:
    """What is drawn in an epoch depends on a seed and the epoch alone."""

    seed: int
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer and accelerate at the beginning of each epoch."""
        self.epoch = epoch

    def seeded(self, generator: torch.Generator) -> torch.Generator:
        """A generator as it is at the beginning of the epoch."""
        return generator.manual_seed(self.seed + self.epoch)


class SeededLengthGroupedSampler(_Seeded, LengthGroupedSampler):
    """transformers' sampler of samples of about one length, whose order depends on a seed and the epoch alone.

    Its own draws from the process's generator, whose state at the beginning of an epoch a resumed run does not have.
    Every sample comes once an epoch; the longest one comes first.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int) -> None:
        super().__init__(batch_size, lengths=list(lengths), generator=torch.Generator())
        self.seed = seed

    def __iter__(self) -> Iterator[int]:
        self.seeded(self.generator)
        yield from super().__iter__()


class StepGroupedSampler(_Seeded, Sampler[int]):
    """Shuffled samples, those of each optimiser step from the longest to the shortest, so that its micro-batches are of
    about one length each. The order depends on a seed and the epoch alone; steps hold the same, whatever the lengths.
    """

    def __init__(self, step: int, lengths: Sequence[int], seed: int) -> None:
        self.step, self.lengths, self.seed = step, lengths, seed

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = self.seeded(torch.Generator())
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        yield from longest_first(order, self.step, self.lengths)


class TokenBatchSampler(_Seeded, BatchSampler):
    """Micro-batches of at most so many tokens, in an order that depends on a seed and the epoch alone.

    Every sample comes once an epoch; the longest one is in the first batch. Epochs have as many batches each.
    """

    def __init__(self, tokens: int, lengths: Sequence[int], seed: int) -> None:
        super().__init__(SequentialSampler(lengths), batch_size=1, drop_last=False)
        self.tokens, self.lengths, self.seed = tokens, lengths, seed
        self.sampler = cast(Any, self)  # whose `set_epoch` accelerate calls, when a resumed run skips batches too
        self.count = len(token_batches(lengths, tokens))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        generator = self.seeded(torch.Generator())
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        first, *others = token_batches(self.lengths, self.tokens, order)
        yield first
        yield from (others[index] for index in torch.randperm(len(others), generator=generator).tolist())


def check_one_process(batch_tokens: int | None, count: int) -> None:
    """Raise UserError where micro-batches that are filled by tokens would be made in several processes."""
    if batch_tokens is not None and count > 1:
        raise UserError(
            f"Micro-batches that are filled by tokens are of one process; there are {count}.",
            where="train.batch_tokens",
            fix="Leave it out and set train.micro_batch_size.",
        )


def lengths_for(session: TunedSession, rows: Dataset) -> list[int] | None:
    """The lengths of a run's samples, where its batches depend on them."""
    if not session.recipe.data.group_by_length and session.recipe.train.batch_tokens is None:
        return None
    return lengths_of(rows, session.collator)
