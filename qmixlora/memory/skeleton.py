"""A recipe's model as it will lie on the card, without storage: shapes and dtypes, NF4 layers among them.

Shapes: I in-features, O out-features; a block is 64 weights with one scale, 256 scales have one scale of their own.
"""

from __future__ import annotations

from typing import Any, cast

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from qmixlora.backbone import Anatomy, find_anatomy
from qmixlora.recipe import Model

from .attention import FUSED

BLOCK, SCALE_BLOCK = 64, 256


def meta_backbone(config: PretrainedConfig, spec: Model) -> tuple[PreTrainedModel, Anatomy]:
    """What `load_backbone` gives, on the meta device: NF4 with double quantisation where it has that, all frozen."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            config,
            dtype=getattr(torch, spec.dtype),
            attn_implementation="eager" if spec.attention == "eager" else FUSED,
            trust_remote_code=spec.trust_remote_code,
        )
    model.name_or_path = spec.id  # PEFT compares it with the adapter's
    anatomy = find_anatomy(model)
    if spec.quantization == "nf4":
        for path in anatomy.targets:
            model.set_submodule(path, meta_linear4bit(cast(nn.Linear, model.get_submodule(path))))
    return model.requires_grad_(False), anatomy


def meta_linear4bit(linear: nn.Linear) -> bnb.nn.Linear4bit:
    """A linear layer as transformers and bitsandbytes leave it on the card: packed bytes, and scales in 8 bits."""
    meta: dict[str, Any] = {"device": "meta"}
    dtype, count = linear.weight.dtype, linear.weight.numel()
    scales = -(-count // BLOCK)
    nested = bnb.functional.QuantState(
        absmax=torch.empty(-(-scales // SCALE_BLOCK), **meta),
        blocksize=SCALE_BLOCK,
        code=torch.empty(256, **meta),
        dtype=torch.float32,
    )
    state = bnb.functional.QuantState(
        absmax=torch.empty(scales, dtype=torch.uint8, **meta),
        shape=linear.weight.shape,
        dtype=dtype,
        blocksize=BLOCK,
        code=torch.empty(16, **meta),
        quant_type="nf4",
        offset=torch.empty((), **meta),
        state2=nested,
    )
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype, quant_type="nf4", **meta
    )
    packed = torch.empty((-(-count // 2), 1), dtype=torch.uint8, **meta)
    layer.weight = bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=BLOCK, compress_statistics=True, quant_type="nf4",
        bnb_quantized=True,
    )  # fmt: skip
    layer.quant_state = state
    layer.bias = linear.bias
    return layer


def tensors_of(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Every tensor that the model holds, by name: parameters, buffers, and the scales of NF4 layers."""
    found = [*model.named_parameters(), *model.named_buffers()]
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            found += [(f"{name}.weight.scales", t) for t in (state.absmax, state.code, state.state2.absmax)]
    return found
