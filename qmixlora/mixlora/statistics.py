"""Routing statistics per task.

Shapes: B batch, T tasks, E = F factors in a pool.
"""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 512  # samples: the plain mean up to here, then an exponential one, since the routers keep moving


def update_task_means(mean_TEF: Tensor, count_T: Tensor, mix_BEF: Tensor, task_ids_B: Tensor) -> None:
    """Fold a batch into the running mean of each task's mixing matrix, in place; samples with task -1 do not count."""
    known_B = task_ids_B >= 0
    ids_B = task_ids_B.clamp(min=0)
    batch_T = torch.zeros_like(count_T).index_add_(0, ids_B, known_B.to(count_T.dtype))
    sum_TEF = torch.zeros_like(mean_TEF).index_add_(0, ids_B, mix_BEF.to(mean_TEF.dtype) * known_B[:, None, None])
    count_T.add_(batch_T)
    rate_T = batch_T / count_T.clamp(min=1, max=WINDOW)
    average_TEF = sum_TEF / batch_T.clamp(min=1)[:, None, None]
    mean_TEF.lerp_(average_TEF, rate_T.clamp(max=1)[:, None, None])
