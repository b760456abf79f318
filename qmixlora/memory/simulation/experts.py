"""Experts on the meta device: their loop over those that some token chose, whose number no tensor there can tell.

Shapes: T tokens, K experts chosen by each, E experts, D width, F width inside an expert.
"""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from qmixlora.backbone.experts import NF4Experts


def plan_experts(model: nn.Module) -> None:
    """Have experts in NF4 that are looped over computed as if the tokens were dealt out evenly."""
    for module in model.modules():
        own = [child for child in module.children() if isinstance(child, NF4Experts)]
        if len(own) == 2 and list(inspect.signature(module.forward).parameters)[1:2] == ["top_k_index"]:
            module.forward = MethodType(_evenly, module)


def _evenly(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """An experts' forward of transformers (5.23): what it holds, and for how long."""
    into, out_of = (child for child in self.children() if isinstance(child, NF4Experts))
    output_TD = torch.zeros_like(hidden_states)
    count, chosen = into.shape[0], top_k_index.numel()
    mask_TKE = torch.empty((*top_k_index.shape, count + 1), dtype=torch.int64, device="meta")
    used = max(1, min(count, chosen))
    for index in range(used):
        rows = torch.empty(-(-chosen // used), dtype=torch.int64, device="meta")
        inside = _product(hidden_states[rows], into[index], hidden_states.shape[-1])
        if inside.shape[-1] not in out_of.shape[1:] or inside.shape[-1] == 2 * min(out_of.shape[1:]):
            gate, up = inside.chunk(2, dim=-1)
            inside = getattr(self, "act_fn", nn.functional.silu)(gate) * up
        else:
            inside = getattr(self, "act_fn", nn.functional.silu)(inside)
        result = _product(inside, out_of[index], inside.shape[-1]) * top_k_weights.flatten()[rows, None]
        output_TD.index_add_(0, rows, result.to(output_TD.dtype))
    del mask_TKE
    return output_TD


def _product(x: Tensor, weight: Any, width: int) -> Tensor:
    """x W^T, or x W where the class holds its matrices transposed."""
    linear = weight.value().shape[-1] == width
    return nn.functional.linear(x, weight) if linear else torch.matmul(x, weight)
