"""Adapters that are not fresh: a fresh one changes nothing, and half of its tensors have no gradient."""

from __future__ import annotations

import torch
from torch import nn


def randomize(model: nn.Module, words: str, *, std: float, seed: int) -> None:
    """Fill the parameters whose names hold these words with normal numbers, the same ones whenever it is called."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if words in name:
            nn.init.normal_(parameter, std=std)
