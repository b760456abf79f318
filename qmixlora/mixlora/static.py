"""A plain LoRA beside the mixture: one update for all inputs, for layers whose input has no instances (a projector's
rows are patches of all images at once).

Shapes: I in-features, O out-features, R rank.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from .config import MixLoraConfig
from .layer import MERGE_REFUSED


class StaticLinear(nn.Module, BaseTunerLayer):
    """LoRA (Hu et al., 2021) around an `nn.Linear`: `mixlora_A` R x I, `mixlora_B` R x O, in fp32, without routers."""

    adapter_layer_names = ("mixlora_A", "mixlora_B")
    other_param_names = ("mixlora_config",)

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: MixLoraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.mixlora_A, self.mixlora_B = nn.ParameterDict(), nn.ParameterDict()
        self.mixlora_config: dict[str, MixLoraConfig] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: MixLoraConfig) -> None:
        """Add an adapter: A Kaiming uniform, B zero, so that the output is unchanged; on the layer's device."""
        fp32: dict[str, Any] = {"dtype": torch.float32, "device": cast(nn.Linear, self.get_base_layer()).weight.device}
        down_RI = torch.empty(config.r, self.in_features, **fp32)
        nn.init.kaiming_uniform_(down_RI, a=math.sqrt(5))
        self.mixlora_A[adapter_name] = nn.Parameter(down_RI)
        self.mixlora_B[adapter_name] = nn.Parameter(torch.zeros(config.r, self.out_features, **fp32))
        self.mixlora_config[adapter_name] = config
        self.set_adapter(self.active_adapters)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Always raises NotImplementedError: see the message."""
        raise NotImplementedError(MERGE_REFUSED)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus `(alpha / R) (x A^T) B` of every active adapter, in the dtype of `x`."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in cast(list[str], self.active_adapters):
            if name in self.mixlora_config:
                config = self.mixlora_config[name]
                dropped = functional.dropout(x, config.dropout, self.training) if config.dropout > 0 else x
                h = functional.linear(dropped, (config.scaling * self.mixlora_A[name]).to(x.dtype))
                result = result + (h @ self.mixlora_B[name].to(x.dtype)).to(result.dtype)
        return result

    def __repr__(self) -> str:
        return "mixlora." + super().__repr__()


def with_static_adapter(target: nn.Module, name: str, config: MixLoraConfig) -> StaticLinear:
    """The layer with an adapter of this name. Raises ValueError for what is no `nn.Linear`."""
    if isinstance(target, StaticLinear):
        target.update_layer(name, config)
        return target
    if type(target) is not nn.Linear:
        raise ValueError(f"A static module is an nn.Linear, and no {type(target).__name__}.")
    return StaticLinear(target, name, config)
