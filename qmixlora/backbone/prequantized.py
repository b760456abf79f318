"""Checkpoints whose weights are quantised already. One in double NF4 by bitsandbytes is loaded as it is; others are
refused by their config: their bytes would be taken for weights, or they would be quantised a second time.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from transformers import PretrainedConfig

from qmixlora.errors import UserError
from qmixlora.recipe import Model

from .levers import has_levers

DOUBLE_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def check_prequantized(config: PretrainedConfig, spec: Model) -> None:
    """Refuse a checkpoint that is quantised otherwise than the recipe says, or that the recipe wants changed.

    Raises:
        UserError: it is; or it is in double NF4, and some of it is to be kept or placed elsewhere.
    """
    facts = own_quantization(config)
    if not facts:
        return
    if facts.items() >= DOUBLE_NF4.items() and spec.quantization == "nf4" and not spec.keep and not has_levers(spec):
        return
    raise quantized_already(config, spec)


def quantized_already(config: PretrainedConfig, spec: Model) -> UserError:
    """The refusal of a checkpoint that is quantised already."""
    facts = own_quantization(config)
    as_it_is = ", or model.quantization: nf4 without model.keep, memory levers and FSDP"
    return UserError(
        f"The checkpoint is itself quantised ({_kind(facts)}).",
        where=f"model.id: {spec.id}",
        fix="Use the original 16-bit checkpoint, which model.quantization: nf4 quantises while it is loaded"
        f"{as_it_is if facts.items() >= DOUBLE_NF4.items() else ''}.",
    )


def own_quantization(config: PretrainedConfig) -> dict[str, Any]:
    """What a checkpoint's config says of weights that are quantised already, where transformers looks for it; empty if
    they are not.
    """
    configs = config, config.get_text_config(decoder=True)
    facts: Any = next((own for part in configs if (own := getattr(part, "quantization_config", None))), {})
    return dict(facts) if isinstance(facts, dict) else facts.to_dict()


def _kind(facts: dict[str, Any]) -> str:
    bits = next((f", {bits} bits" for bits in (4, 8) if facts.get(f"load_in_{bits}bit")), "")
    return f"{facts.get('quant_method', 'bitsandbytes' if bits else 'in an unknown way')}{bits}"


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Have NF4 layers compute in a dtype, whatever their checkpoint was quantised to compute in."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
