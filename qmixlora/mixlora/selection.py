"""Which factors work for an instance: conditions and scores to one mixing matrix.

Shapes: B batch, S sequence, I in-features, D width of the condition, E factors in a pool, R active factors; E and F are
the same size where a matrix links pool A (E) to pool B (F).

Every combination of pairing and gate ends in the same object, `mix_BEF`: the weight with which factor a_e and factor
b_f share a slot. The layer computes `((x A^T) mix) B` and never looks at indices, so a hard selection, a dense gate
and a task's mean (whose mix is what the exporter folds into an ordinary LoRA) are one code path.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .config import MixLoraConfig


def mean_over(x_BSI: Tensor, mask_BS: Tensor | None) -> Tensor:
    """The mean input over the routing tokens (B x I, fp32); over all positions where there is no mask.

    Summed in fp32 whatever the input's dtype, so that padding and batch neighbours cannot tip a selection.
    """
    if mask_BS is None:
        return x_BSI.mean(dim=1, dtype=torch.float32)
    total_BI = (x_BSI * mask_BS[..., None]).sum(dim=1, dtype=torch.float32)
    return total_BI / mask_BS.sum(dim=1, keepdim=True).clamp(min=1)


def independent_scores(condition_BD: Tensor, route_ED: Tensor) -> Tensor:
    """IFS, `p = softmax(route . c)` (B x E): paper, independent factor selection."""
    return (condition_BD @ route_ED.T).softmax(dim=-1)


def conditional_scores(chosen_BR: Tensor, pool_EI: Tensor, route_RIE: Tensor) -> Tensor:
    """CFS, `q = sum_i softmax(A[g_A[i]] . route_AB[i])` (B x E): paper, conditional factor selection."""
    return torch.einsum("bri,rie->bre", pool_EI[chosen_BR], route_RIE).softmax(dim=-1).sum(dim=1)


def _slots(scores_BE: Tensor, chosen_BR: Tensor, gate: str) -> Tensor:
    """One row per slot, zero but for the gate of the chosen factor (B x R x E)."""
    score_BR = scores_BE.gather(1, chosen_BR)
    if gate == "hard":
        weight_BR = torch.ones_like(score_BR)
    elif gate == "straight_through":  # 1 in the forward pass, the score's gradient in the backward pass
        weight_BR = 1 + score_BR - score_BR.detach()
    else:
        weight_BR = score_BR / score_BR.mean(dim=1, keepdim=True)
    return one_hot(chosen_BR, scores_BE.shape[1]) * weight_BR[..., None]


def select(
    config: MixLoraConfig,
    condition_BD: Tensor,
    pool_EI: Tensor,
    route_A_ED: Tensor,
    route_B_ED: Tensor | None,
    route_AB_RIE: Tensor | None,
) -> Tensor:
    """The mixing matrix `mix_BEF` of every instance (fp32).

    The i-th chosen a is paired with the i-th chosen b, in the order of their scores. Where A and B are chosen apart
    the gates of the two multiply. `dense` is `weighted` with all E factors in play, paired by index: each pool's gates
    have mean 1 and the sum is scaled by R / E, so that its size is comparable to R chosen factors.

    Args:
        condition_BD: what to route on. pool_EI: factor pool A (only read by `pairing="conditional"`).
        route_A_ED, route_B_ED, route_AB_RIE: the routers; those that the pairing does not use are None.
    """
    score_A_BE = independent_scores(condition_BD, route_A_ED)
    chosen_A_BR = score_A_BE.topk(config.r, dim=1).indices
    if route_B_ED is None:  # tied
        score_B_BE = None
    else:
        score_B_BE = independent_scores(condition_BD, route_B_ED)
        if route_AB_RIE is not None:
            score_B_BE = score_B_BE + conditional_scores(chosen_A_BR, pool_EI, route_AB_RIE)

    if config.gate == "dense":
        gate_BE = score_A_BE / score_A_BE.mean(dim=1, keepdim=True)
        if score_B_BE is not None:
            gate_BE = gate_BE * score_B_BE / score_B_BE.mean(dim=1, keepdim=True)
        return torch.diag_embed(gate_BE * config.r / config.num_factors)

    slots_A_BRE = _slots(score_A_BE, chosen_A_BR, config.gate)
    if score_B_BE is None:
        slots_B_BRF = one_hot(chosen_A_BR, config.num_factors).to(slots_A_BRE.dtype)
    else:
        slots_B_BRF = _slots(score_B_BE, score_B_BE.topk(config.r, dim=1).indices, config.gate)
    return slots_A_BRE.transpose(1, 2) @ slots_B_BRF
