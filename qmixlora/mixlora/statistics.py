"""Running means that training keeps: of each task's mixing matrix, and of what is routed on.

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

    `mean_T` is T x ..., `values_B` B x the same; for the mixes of tasks T x E x F and B x E x F.
    """
    known_B = ids_B >= 0
    ids_B = ids_B.clamp(min=0)

    def wide(weight: Tensor) -> Tensor:
        return weight.view(-1, *(1,) * (mean_T.dim() - 1))

    batch_T = torch.zeros_like(count_T).index_add_(0, ids_B, known_B.to(count_T.dtype))
    sum_T = torch.zeros_like(mean_T).index_add_(0, ids_B, values_B.to(mean_T.dtype) * wide(known_B))
    count_T.add_(batch_T)
    rate_T = batch_T / count_T.clamp(min=1, max=WINDOW)
    mean_T.lerp_(sum_T / wide(batch_T.clamp(min=1)), wide(rate_T.clamp(max=1)))


class Center(nn.Module):
    """Puts conditions on one scale (layer norm) and takes off what all of them share, their running mean.

    Pooled states of one model have nearly one direction in common; what tells instructions apart is small beside it.
    The mean is the one from before the batch, so that a sample's routing does not depend on its neighbours.
    """

    mean: Tensor  # 1 x D
    count: Tensor  # 1

    def __init__(self, width: int, **place: Any) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, width, **place))
        self.register_buffer("count", torch.zeros(1, **place))

    def forward(self, condition_BD: Tensor, routing: Routing) -> Tensor:
        condition_BD = layer_norm(condition_BD, condition_BD.shape[-1:])
        if not self.training:
            return condition_BD - self.mean
        if self not in routing.centers:  # the first pass over this batch, not its recomputation
            routing.centers[self] = self.mean.clone()
            nobody_B = torch.zeros(len(condition_BD), dtype=torch.long, device=condition_BD.device)
            update_means(self.mean, self.count, condition_BD.detach(), nobody_B)
        return condition_BD - routing.centers[self]
