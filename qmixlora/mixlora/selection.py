"""Which factors work for an instance: conditions and scores to one mixing matrix.

Shapes: B batch (of instances: see segments.py), S sequence, K masks, I in-features, D width of the condition, E factors
in a pool, R active factors; E and F are the same size where a matrix links pool A (E) to pool B (F).

Every combination of pairing and gate ends in the same object, `mix_BEF`: the weight with which factor a_e and factor
b_f share a slot. The layer computes `((x A^T) mix) B` and never looks at indices, so a hard selection, a dense gate
and a task's mean (whose mix is what the exporter folds into an ordinary LoRA) are one code path. Where factors are
paired by index the matrices are diagonal, and the layer multiplies with their diagonals (`weights_of`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .config import MixLoraConfig


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Leave autocast for a block: selection is fp32 whoever trains, and however. (The meta device has none.)"""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def mean_over(x_BSI: Tensor, mask_BS: Tensor | None) -> Tensor:
    """The mean input over the routing tokens (B x I, fp32); over all positions where there is no mask.

    The router reads the input and does not shape it: no gradient flows back, which spares a B x S x I tensor for every
    layer.
    """
    if mask_BS is None:
        return x_BSI.detach().mean(dim=1, dtype=torch.float32)
    return means_over(x_BSI, mask_BS[:, None])[:, 0]


def means_over(x_BSI: Tensor, mask_BKS: Tensor) -> Tensor:
    """The mean input over each of a sample's masks (B x K x I, fp32), without a gradient; zero where a mask is empty.

    Summed in fp32 whatever the input's dtype, so that padding and batch neighbours cannot tip a selection.
    """
    weight_BKS = mask_BKS / mask_BKS.sum(dim=2, keepdim=True).clamp(min=1)
    return torch.bmm(weight_BKS.float(), x_BSI.detach().float())


def independent_scores(logits_BE: Tensor) -> Tensor:
    """IFS, `p = softmax(route . c)` (B x E) from its logits: paper, independent factor selection."""
    return logits_BE.softmax(dim=-1)


def conditional_scores(chosen_BR: Tensor, pool_EI: Tensor, route_RIE: Tensor) -> Tensor:
    """CFS, `q = sum_i softmax(A[g_A[i]] . route_AB[i])` (B x E): paper, conditional factor selection."""
    return torch.einsum("bri,rie->bre", pool_EI[chosen_BR], route_RIE).softmax(dim=-1).sum(dim=1)


def released_conditional_scores(chosen_BR: Tensor, pool_EI: Tensor, route_RIE: Tensor) -> Tensor:
    """CFS as the released code has it (B x E): its einsum sums factor and router over I apart, so that their sums are
    multiplied in place of an inner product, and a second softmax flattens the result.
    """
    q_BE = torch.einsum("brd,rie->bre", pool_EI[chosen_BR], route_RIE).softmax(dim=-1).sum(dim=1)
    return q_BE.softmax(dim=-1)


def _weights(score_BR: Tensor, config: MixLoraConfig) -> Tensor:
    """The weights of the chosen factors, from their scores (B x R)."""
    if config.gate == "hard":
        return torch.ones_like(score_BR)
    if config.gate == "straight_through":  # 1 in the forward pass, the score's gradient in the backward pass
        return 1 + score_BR - score_BR.detach()
    return score_BR / score_BR.mean(dim=1, keepdim=True)


def select(
    config: MixLoraConfig,
    logits_A_BE: Tensor,
    logits_B_BE: Tensor | None = None,
    conditional: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The mixing matrix `mix_BEF` of every instance (fp32).

    The i-th chosen a is paired with the i-th chosen b, in the order of their scores. Where B's scores are conditional
    the gates of the two multiply. `dense` is `weighted` with all E factors in play, paired by index: each pool's gates
    have mean 1 and the sum is scaled by R / E, so that its size is comparable to R chosen factors.

    Args:
        logits_A_BE, logits_B_BE: `route . c` of the IFS routers; none for B where the pairing is tied.
        conditional: what the CFS router adds to B's scores (B x E), given the factors chosen from A (B x R); none where
            the pairing is tied.
    """
    score_A_BE, score_B_BE = independent_scores(logits_A_BE), None
    chosen_A_BR = score_A_BE.topk(config.r, dim=1).indices if conditional or not config.takes_all else None
    if conditional is not None:
        assert chosen_A_BR is not None and logits_B_BE is not None
        score_B_BE = independent_scores(logits_B_BE) + conditional(chosen_A_BR)

    if chosen_A_BR is None or config.takes_all:
        gate_BE = _weights(score_A_BE, config)
        if score_B_BE is not None:
            gate_BE = gate_BE * _weights(score_B_BE, config)
        return torch.diag_embed(gate_BE * config.r / config.num_factors)

    weight_BR = _weights(score_A_BE.gather(1, chosen_A_BR), config)
    chosen_B_BR = chosen_A_BR
    if score_B_BE is not None:
        chosen_B_BR = score_B_BE.topk(config.r, dim=1).indices
        weight_BR = weight_BR * _weights(score_B_BE.gather(1, chosen_B_BR), config)
    e = config.num_factors
    slots_BR = chosen_A_BR * e + chosen_B_BR  # distinct: neither list repeats a factor
    return weight_BR.new_zeros(len(weight_BR), e * e).scatter(1, slots_BR, weight_BR).view(-1, e, e)


def weights_of(config: MixLoraConfig, mix_BEF: Tensor, dtype: torch.dtype) -> Tensor:
    """What a layer multiplies `x A^T` with: the mixing matrices, scaled by alpha / R; of factors that are paired by
    index the gates alone (B x E).
    """
    weight_B = mix_BEF.diagonal(dim1=1, dim2=2) if config.pairs_by_index else mix_BEF
    return (config.scaling * weight_B).to(dtype)
