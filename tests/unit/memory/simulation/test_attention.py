"""Attention of a simulated step."""

from __future__ import annotations

import torch
from torch import nn

from qmixlora.memory.simulation.attention import fused_attention
from qmixlora.memory.simulation.simulation import LiveStorages


def test_attention_never_holds_the_square() -> None:
    query = torch.empty(2, 4, 512, 32, device="meta", requires_grad=True)
    with LiveStorages([query]) as storages:
        out, _ = fused_attention(nn.Identity(), query, query, query, None)
        out.sum().backward()
    assert out.shape == (2, 512, 4, 32) and query.grad is not None and query.grad.shape == query.shape
    assert storages.account.peak < 2 * 4 * 512 * 512 * 4
