"""The linear layers of the vision tower's blocks in 8 or 4 bits. The rest stays as it is: convolutions, norms,
positions, and what comes before and after the blocks, such as projectors.

Shapes: O out-features, I in-features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..nf4 import BLOCK, nf4_linear, quant_state_of
from .int8_linear import Int8Linear


@dataclass(frozen=True)
class VisionError:
    """How far the quantised weights of a tower are from its own, by their norm: in the mean, and in the worst layer."""

    mean: float
    worst: float
    layer: str

    def __str__(self) -> str:
        return f"its weights are {self.mean:.1%} off in the mean, {self.worst:.1%} in the worst layer ({self.layer})"


def quantize_vision(
    model: nn.Module, anatomy: Anatomy, kind: Literal["int8", "nf4"], device: torch.device
) -> VisionError | None:
    """Quantise linear layers of the vision tower (`vision_linears`) in place, each on the device; return their error
    (none on meta).

    Rows that are not whole blocks of 64, which bitsandbytes' CPU kernel computes wrongly in NF4, are held in 8 bits.
    (SigLIP's have 4,304 numbers.) Layers that a module reads the weights of, such as those of `nn.MultiheadAttention`,
    stay in 16 bits: they are of classes of their own.
    """
    errors = {}
    for path, linear in vision_linears(model, anatomy):
        weight_OI = linear.weight.detach()
        bias_O = None if linear.bias is None else linear.bias.detach()
        in_nf4 = kind == "nf4" and linear.in_features % BLOCK == 0
        layer = nf4_linear(weight_OI, bias_O, device) if in_nf4 else Int8Linear(weight_OI, bias_O, device)
        model.set_submodule(path, layer)
        if device.type != "meta":
            errors[path] = _error(weight_OI.to(device), layer)
    if not errors:
        return None
    worst = max(errors, key=lambda path: errors[path])
    return VisionError(sum(errors.values()) / len(errors), errors[worst], worst)


def vision_linears(model: nn.Module, anatomy: Anatomy) -> list[tuple[str, nn.Linear]]:
    """The linear layers of the vision tower that may be quantised, by their paths: those of its blocks, which are in
    lists, and none of a projector.

    A tower casts its pixels to the dtype of the weight that embeds patches (SigLIP 2 has a linear layer there): in 8 or
    4 bits that is one of whole numbers, which would leave nothing of an image.
    """
    inside = tuple(
        f"{path}.{name}".rstrip(".") + "."
        for path in anatomy.vision
        for name, module in model.get_submodule(path).named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    )
    apart = tuple(f"{path}." for path in anatomy.projectors)
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.startswith(inside) and not f"{name}.".startswith(apart)
    ]


def _error(weight_OI: Tensor, layer: Any) -> float:
    if isinstance(layer, Linear4bit):
        held_OI = dequantize_4bit(layer.weight.data, quant_state_of(layer)).view_as(weight_OI)
    else:
        held_OI = layer.weight * layer.scale
    return float((held_OI.float() - weight_OI.float()).norm() / weight_OI.float().norm().clamp_min(1e-30))
