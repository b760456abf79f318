"""The validation loss: the mean over supervised tokens, as the training loss is, whatever the batches."""

from __future__ import annotations

import torch
from torch import Tensor

from qmixlora import processes
from qmixlora.data import IGNORED


class ValidationLoss:
    """The mean loss over the supervised tokens of an evaluation's batches. (Trainer's own is the mean over batches, so
    that it depends on their size.)
    """

    def __init__(self) -> None:
        self.sums: list[Tensor] = []  # on the device: the host waits for it once
        self.tokens = 0

    def add(self, loss: Tensor, labels_BS: Tensor) -> None:
        """Count a batch by the mean loss over its supervised tokens, and its labels on the host."""
        tokens = int((labels_BS[:, 1:] != IGNORED).sum())
        self.sums.append(loss.detach().double() * tokens)
        self.tokens += tokens

    def mean(self) -> float:
        """The loss over the batches of all processes; every process must call this, one at least with a batch."""
        summed = float(torch.stack(self.sums).sum()) if self.sums else 0.0
        return processes.total(summed) / processes.total(self.tokens)
