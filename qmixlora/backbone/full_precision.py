"""Modules that are trained whole, in full precision inside a 16-bit model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only


def train_in_fp32(module: nn.Module) -> None:
    """Hold and compute a fully trained module in fp32 inside a 16-bit model: inputs up, outputs back,
    in whatever they are nested.

    PEFT leaves the trained copy in the base dtype, in which small optimiser steps are lost.
    """
    module.float()
    dtype = torch.get_default_dtype()

    def up(value: Any) -> Any:
        nonlocal dtype
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        dtype = value.dtype
        return value.float()

    def raise_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tree_map(up, (args, kwargs))

    def lower_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return tree_map_only(Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value, output)

    module.register_forward_pre_hook(raise_inputs, with_kwargs=True)
    module.register_forward_hook(lower_output)
