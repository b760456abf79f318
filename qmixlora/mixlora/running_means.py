"""Running means that training keeps: of each task's mixing matrices, and of the conditions.

Shapes: B batch, D width of the condition, T tasks, E = F factors in a pool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

if TYPE_CHECKING:
    from .routing import Routing

WINDOW = 512  # samples: the plain mean up to here, then an exponential one, since the routers keep moving


def update_means(mean_T: Tensor, count_T: Tensor, values_B: Tensor, ids_B: Tensor) -> None:
    """Fold a batch into the running mean of each id, in place; samples with id -1 do not count.

    `mean_T` is T x ..., `values_B` B x the same; for mixing matrices T x E x F and B x E x F.
    """
    known_B = ids_B >= 0
    ids_B = ids_B.clamp(min=0)
    # only the rows of these ids are touched, of however many: each sample computes the new row of its id, and samples
    # of one id write the same
    same_BB = ((ids_B[:, None] == ids_B) & known_B).to(mean_T.dtype)
    mean_B, count_B = mean_T.index_select(0, ids_B), count_T.index_select(0, ids_B)
    sum_B = (same_BB @ values_B.to(mean_T.dtype).flatten(1)).view_as(mean_B)
    _fold(mean_B, count_B, sum_B, same_BB.sum(dim=1))
    mean_T.index_copy_(0, ids_B, mean_B)
    count_T.index_copy_(0, ids_B, count_B)


def _fold(mean_T: Tensor, count_T: Tensor, sum_T: Tensor, batch_T: Tensor) -> None:
    """Take the sums of `batch_T` more samples into the means, in place: the plain mean over the first WINDOW samples,
    then an exponential one.
    """
    count_T.add_(batch_T)
    rate_T = (batch_T / count_T.clamp(min=1, max=WINDOW)).clamp(max=1)
    mean_T.lerp_(sum_T / _wide(batch_T.clamp(min=1), mean_T), _wide(rate_T, mean_T))


def _wide(weight: Tensor, like: Tensor) -> Tensor:
    """A weight per row, shaped to multiply the rows of `like`."""
    return weight.view(-1, *(1,) * (like.dim() - 1))


class Center(nn.Module):
    """Layer-normalises conditions and subtracts their running mean.

    Pooled states of one model nearly share one direction, beside which the differences between instructions are small.
    The mean is the one from before the optimiser step, so that a sample's routing depends neither on its neighbours in
    the batch nor on how the batch is split for accumulation or over processes; the sums of a step wait in `pending`.
    """

    mean: Tensor  # 1 x D
    count: Tensor  # 1, samples in the mean
    pending: Tensor  # 1 x D, a sum
    pending_count: Tensor  # 1

    def __init__(self, width: int, **factory: Any) -> None:
        super().__init__()
        for name, size in (("mean", (1, width)), ("count", (1,)), ("pending", (1, width)), ("pending_count", (1,))):
            self.register_buffer(name, torch.zeros(size, **factory))

    def forward(self, condition_BD: Tensor, routing: Routing) -> Tensor:
        condition_BD = layer_norm(condition_BD, condition_BD.shape[-1:])
        if self in routing.cache.centers:  # the recomputation of a layer under activation checkpointing
            return condition_BD - routing.cache.centers[self]
        if routing.starts_step or not self.training:
            self.fold()
        if self.training and routing.learns:
            routing.cache.centers[self] = self.mean.clone()
            self.pending.add_(condition_BD.detach().sum(dim=0))
            self.pending_count.add_(len(condition_BD))
        return condition_BD - self.mean

    def fold(self) -> None:
        """Take what is pending into the mean."""
        _fold(self.mean, self.count, self.pending, self.pending_count)
        self.pending.zero_()
        self.pending_count.zero_()


def sums_of_step(model: nn.Module, *, idle: bool = False) -> list[Tensor]:
    """What the training passes since the last optimiser step have added up in a model's centres, for several processes
    to sum in place before they step. `idle`: this process had no pass.
    """
    centers = [module for module in model.modules() if isinstance(module, Center)]
    if idle:  # the first pass would have done it
        for center in centers:
            center.fold()
    return [tensor for center in centers for tensor in (center.pending, center.pending_count)]
