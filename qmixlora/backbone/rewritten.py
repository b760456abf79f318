"""Layers whose names stock PEFT takes for other parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import LoraConfig
from transformers import PreTrainedModel


def rewritten_by_peft(model: PreTrainedModel, names: Sequence[str]) -> tuple[str, ...]:
    """The layers of these that a LoRA in stock PEFT cannot be on. For kinds of models that had their experts as linear
    layers before transformers 5, PEFT (0.21) takes `down_proj` for the experts', wherever such a layer is.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # earlier releases rewrite nothing
        return ()
    config = LoraConfig(target_modules=list(names))
    convert_peft_config_for_transformers(config, model, None)
    left = set(config.target_modules or ())
    return tuple(name for name in names if name not in left)


def renamed_on_loading(model: PreTrainedModel, names: Sequence[str]) -> tuple[str, ...]:
    """The layers of these whose weights stock PEFT (0.21) would look for under other names when it loads a LoRA: it
    renames them as a checkpoint's, where transformers' patterns for that fit the names that a loaded model has.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ImportError:  # earlier releases rename nothing
        return ()
    keys = {f"base_model.model.{name}.lora_A.weight": name for name in names}
    state = {key: torch.empty(1) for key in keys}
    loaded = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(target_modules=list(names)), state)
    return tuple(name for key, name in keys.items() if key not in loaded)
