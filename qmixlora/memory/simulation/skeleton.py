"""A recipe's model as it will lie on the card, without storage: shapes and dtypes, NF4 layers among them."""

from __future__ import annotations

import copy
from typing import cast

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from qmixlora.backbone import Anatomy, make_skeleton, nf4_linear, quant_state_of
from qmixlora.backbone.experts import NF4Experts, nf4_experts, put_experts
from qmixlora.backbone.frozen import freeze
from qmixlora.backbone.levers import apply_levers
from qmixlora.recipe import Model

from .attention import FUSED
from .experts import plan_experts

META = torch.device("meta")
TASKS = ("plan", "other")  # of an adapter that is only planned


def meta_backbone(config: PretrainedConfig, spec: Model) -> tuple[PreTrainedModel, Anatomy]:
    """The backbone of `load_backbone`, on the meta device; weights in host memory are CPU tensors that take nothing.

    Raises UserError as `make_skeleton` and `apply_levers`.
    """
    model, anatomy = _skeleton(config, spec)
    model.name_or_path = spec.id  # PEFT compares it with the adapter's
    if spec.quantization == "nf4":
        for path in anatomy.in_nf4:
            linear = cast(nn.Linear, model.get_submodule(path))
            model.set_submodule(path, nf4_linear(linear.weight, linear.bias, META))
        for name in anatomy.experts_in_nf4:
            put_experts(model, name, nf4_experts(model.get_parameter(name), META))
        plan_experts(model)
    freeze(model, anatomy)
    apply_levers(model, anatomy, spec, META)
    return model, anatomy


def _skeleton(config: PretrainedConfig, spec: Model) -> tuple[PreTrainedModel, Anatomy]:
    if spec.attention == "eager":
        return make_skeleton(config, spec, "eager")
    try:
        return make_skeleton(copy.deepcopy(config), spec, FUSED)
    except KeyError:  # a tower whose classes are looked up by the names of transformers' own (SAM's)
        return make_skeleton(config, spec, {"": "sdpa", "text_config": FUSED})


def tensors_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every tensor that the model holds, by name: parameters, buffers, and the scales of NF4 layers."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit | NF4Experts):
            state = quant_state_of(module)
            tensors += [(f"{name}.weight.scales", t) for t in (state.absmax, state.code, state.state2.absmax)]
    return tensors
