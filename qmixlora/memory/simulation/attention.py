"""Attention as the kernels on the card do it, for the account of a simulated step.

Shapes: B batch, H heads, S sequence, D width of a head.

On the meta device torch computes scaled dot-product attention from its formula and builds the S x S matrix, which the
fused CUDA kernels (flash, memory-efficient) never hold: they keep the output and one number per query.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, use_gqa_in_sdpa
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

FUSED = "qmixlora_fused"  # the name under which transformers finds it


class _Fused(torch.autograd.Function):
    """Allocates the tensors of the fused kernels.

    Forward the output and the log-sum-exp (B x H x S, fp32), and the numbers of a mask (B x 1 x S x S, 16 bits);
    backward the three gradients, and an fp32 sum of the queries' (flash attention 2).
    """

    @staticmethod
    def forward(ctx: Any, query_BHSD: Tensor, key_BHSD: Tensor, value_BHSD: Tensor, bias_B1SS: Tensor | None) -> Tensor:
        # laid out as the query is (B x S x H x D in memory, after a projection), so that nothing is copied afterwards
        out_BHSD = torch.empty_like(query_BHSD[..., :1].expand(*query_BHSD.shape[:-1], value_BHSD.shape[-1]))
        sums_BHS = query_BHSD.new_empty(query_BHSD.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query_BHSD, key_BHSD, value_BHSD, out_BHSD, sums_BHS, bias_B1SS)
        return out_BHSD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query_BHSD, key_BHSD, value_BHSD, *_ = ctx.saved_tensors
        sum_BHSD = torch.empty_like(query_BHSD, dtype=torch.float32)
        gradients_of_inputs = torch.empty_like(query_BHSD), torch.empty_like(key_BHSD), torch.empty_like(value_BHSD)
        del sum_BHSD
        return *gradients_of_inputs, None


def fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers (B x H x S x D to B x S x H x D) with the memory of the fused kernels.

    Under a mask, transformers repeats the keys and values that queries share, and torch turns the mask into numbers.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1 and not use_gqa_in_sdpa(attention_mask, key, value):
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    bias = None if attention_mask is None else attention_mask.to(query.dtype)
    return _Fused.apply(query, key, value, bias).transpose(1, 2).contiguous(), None


AttentionInterface.register(FUSED, fused_attention)
AttentionMaskInterface.register(FUSED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
