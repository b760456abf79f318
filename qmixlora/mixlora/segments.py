"""Segments: each question of a conversation with its answer is one instance of the method.

A segment ends with an answer, the token that ends it included, and the next one begins there. It is routed on its own
question, and its tokens use its gates; attention runs across segments as ever. So an answer has the same logits
whether it is learned, generated with its history in the key-value cache, or with a history that is prefilled at once.

Shapes: B batch, S sequence, N segments of all samples (instances), K of the sample with the most, I in-features, E = F
factors in a pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import accumulate

import torch
from torch import Tensor

from .selection import means_over

# of B samples: one label each, or a list of those of its segments, from the conversation's first one on
Tasks = Sequence[str | Sequence[str]]


@dataclass(frozen=True)
class Segments:
    """Where the N segments of a batch are: those of the first sample, then those of the second, and so on.

    `numbers` are those of each sample's segments, in its conversation. `of_BSK` tells the tokens of a sample's k-th
    segment, and `instance_BK` its place among the N (any, where a sample has fewer); `slot_N` is the inverse, a place
    in B x K. `first_B` and `last_B` are the places of each sample's first and last segment among the N.
    """

    numbers: tuple[range, ...]
    of_BSK: Tensor
    instance_BK: Tensor
    slot_N: Tensor
    first_B: Tensor
    last_B: Tensor
    cast: dict[torch.dtype, Tensor] = field(default_factory=dict, init=False)

    @staticmethod
    def of_pass(
        number_BS: Tensor | None, reached_B: Tensor | None, device: torch.device
    ) -> tuple[Segments | None, Tensor | None]:
        """(the segments of a forward pass, the number of each sample's last one), from the number of every token's.

        `reached_B` are the numbers that samples go on from, whose segments a key-value cache holds (-1: padding alone,
        as a segment of its own). All numbers are on the host. No segments where every sample stays in one, which needs
        nothing of all this.

        Raises ValueError as `of`.
        """
        if number_BS is None:
            return None, reached_B
        start_B = torch.zeros(len(number_BS), dtype=number_BS.dtype) if reached_B is None else reached_B
        last_B = torch.maximum(start_B, number_BS.amax(dim=1))
        numbers = tuple(range(start, last + 1) for start, last in zip(start_B.tolist(), last_B.tolist(), strict=True))
        return Segments.of((number_BS - start_B[:, None]).clamp(min=0), numbers, device), last_B

    @staticmethod
    def of(local_BS: Tensor, numbers: tuple[range, ...], device: torch.device) -> Segments | None:
        """The segments, on `device`, by the number of every token's, counted from the sample's first in the pass.

        Raises ValueError where a number is missing before the last.
        """
        counts = [len(own) for own in numbers]
        most = max(counts)
        if most == 1:
            return None
        of_BSK = local_BS[..., None] == torch.arange(most)
        if not (of_BSK[..., 1:].any(dim=1).sum(dim=1) == torch.tensor(counts) - 1).all():
            raise ValueError("Segments are numbered one after the other: 0, 1, 2, ...; padding is -1.")
        first = [end - count for end, count in zip(accumulate(counts), counts, strict=True)]
        places = list(zip(first, counts, strict=True))
        instance_BK = torch.tensor([[start + min(k, count - 1) for k in range(most)] for start, count in places])
        slot_N = torch.tensor([row * most + k for row, count in enumerate(counts) for k in range(count)])
        first_B, last_B = torch.tensor(first), torch.tensor([start + count - 1 for start, count in places])
        tensors = (of_BSK, instance_BK, slot_N, first_B, last_B)
        return Segments(numbers, *(tensor.to(device, non_blocking=True) for tensor in tensors))

    def at_columns(self, columns: slice) -> Segments:
        """The same segments, of some columns of the batch's tokens."""
        return replace(self, of_BSK=self.of_BSK[:, columns])

    def mean(self, x_BSI: Tensor, mask_BS: Tensor | None) -> Tensor:
        """The mean input over the routing tokens of every segment (N x I, fp32)."""
        of_BSK = self.of_BSK if mask_BS is None else self.of_BSK & mask_BS[..., None]
        return means_over(x_BSI, of_BSK.transpose(1, 2)).flatten(0, 1).index_select(0, self.slot_N)

    def holding(self, mask_BS: Tensor) -> Tensor:
        """The tokens of those segments that have a token in the mask (B x S)."""
        has_BK = (self.of_BSK & mask_BS[..., None]).any(dim=1)
        return (self.of_BSK & has_BK[:, None]).any(dim=2)

    def all_but_last_hold(self, mask_BS: Tensor) -> bool:
        """Whether every segment but its sample's last has a token in the mask."""
        has_N = (self.of_BSK & mask_BS[..., None]).any(dim=1).flatten().index_select(0, self.slot_N)
        return bool(has_N.index_fill(0, self.last_B, True).all())

    def mixed(self, h_BSE: Tensor, weight_N: Tensor) -> Tensor:
        """Every token's `h mix` (B x S x F), with gates (N x E) or mixing matrices (N x E x F) of its own segment.

        For the backward pass it holds as much as `h`, whatever K: of matrices per token, or of `h` per segment, there
        would be many times that. Gates come to their tokens by a product, whose gradient sums them up in fp32.
        """
        if weight_N.dim() == 2:
            gate_BSE: Tensor = self._weights(h_BSE.dtype) @ self._by_sample(weight_N)
            return h_BSE * gate_BSE
        of_segments, matrices = self.of_BSK.split(1, dim=2), self._by_sample(weight_N).unbind(dim=1)
        parts = (
            torch.where(of_BS1, h_BSE @ mix_BEF, 0.0) for of_BS1, mix_BEF in zip(of_segments, matrices, strict=True)
        )
        return reduce(torch.add, parts)

    def _by_sample(self, values_N: Tensor) -> Tensor:
        """Values of the instances, by sample and segment (N x ... to B x K x ...)."""
        values_BK: Tensor = values_N.index_select(0, self.instance_BK.flatten())
        return values_BK.view(*self.instance_BK.shape, *values_N.shape[1:])

    def _weights(self, dtype: torch.dtype) -> Tensor:
        """`of_BSK` as numbers, made once for all layers."""
        if dtype not in self.cast:
            self.cast[dtype] = self.of_BSK.to(dtype)
        return self.cast[dtype]

    def going_on_with(self, mix_NEF: Tensor, carried_BEF: Tensor) -> Tensor:
        """The mixing matrices, where each sample's first segment goes on with gates that it has already."""
        return mix_NEF.index_copy(0, self.first_B, carried_BEF)

    def at_the_end(self, mix_NEF: Tensor) -> Tensor:
        """The mixing matrices of each sample's last segment (B x E x F)."""
        return mix_NEF.index_select(0, self.last_B)


def columns(given_BX: Tensor, shape: Sequence[int], start: int, beyond_B1: Tensor) -> Tensor:
    """What is known of the tokens of a forward pass of this shape (B x S x ...): the columns from `start` on of what is
    known of the whole sequence, and `beyond_B1` after its end. As wide as the pass, it is the pass' own. Beams repeat
    their sample.

    Raises ValueError if the number of rows does not fit.
    """
    rows, width = shape[:2]
    if rows % len(given_BX):
        raise ValueError(f"Segments or a routing mask of {len(given_BX)} samples for a batch of {rows}.")
    if given_BX.shape[1] != width:
        given_BX = given_BX[:, start : start + width]
        given_BX = torch.cat([given_BX, beyond_B1.expand(-1, width - given_BX.shape[1])], dim=1)
    return given_BX if rows == len(given_BX) else given_BX.repeat_interleave(rows // len(given_BX), dim=0)


def instance_labels(tasks: Tasks, rows: int, numbers: Sequence[range] | None) -> list[str]:
    """The label of every instance of a batch, from those of its samples; `numbers` are those of each sample's segments
    in its conversation. Where whole samples are instances (None), a list of labels stands for its last one. Beams
    repeat their sample.

    Raises ValueError if their number does not fit.
    """
    if not tasks or rows % len(tasks):
        raise ValueError(f"{len(tasks)} task labels for a batch of {rows}: give one per sample.")
    labels: list[str] = []
    for row in range(rows):
        own = tasks[row // (rows // len(tasks))]
        if isinstance(own, str):
            labels += [own] * (1 if numbers is None else len(numbers[row]))
        elif numbers is None:
            labels.append(own[-1])
        elif len(own) > numbers[row][-1]:
            labels += [own[max(number, 0)] for number in numbers[row]]  # padding, behind which a sample begins, has any
        else:
            raise ValueError(f"{len(own)} task labels for a sample of {numbers[row][-1] + 1} segments: give one each.")
    return labels
