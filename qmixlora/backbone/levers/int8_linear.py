"""A frozen linear layer in 8 bits, whose product is with its dequantised weight in both passes.

Shapes: O out-features, I in-features, ... any leading axes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .quantized_embedding import quantize_rows


class Int8Linear(nn.Module):
    """A frozen linear layer held as whole numbers of 8 bits with an fp32 scale for each out-feature.

    Not bitsandbytes' `Linear8bitLt`, which rounds its *input* to 8 bits too: on a GPU always, on the CPU (0.50.2) in
    evaluation alone, so that training and evaluation disagree (3 % of the output, with one large channel of 256).
    """

    weight: Tensor  # O x I, int8
    scale: Tensor  # O x 1, fp32
    bias: Tensor | None  # O

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, device: torch.device) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OI.shape
        int8_OI, scale_O1 = quantize_rows(weight_OI, device)
        self.register_buffer("weight", int8_OI)
        self.register_buffer("scale", scale_O1)
        self.register_buffer("bias", None if bias_O is None else bias_O.to(device))

    def forward(self, x: Tensor) -> Tensor:
        """... x I -> ... x O: the product with the dequantised weight, in the dtype of `x`."""
        y: Tensor = _Int8Product.apply(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Int8Product(torch.autograd.Function):
    """x W^T, which keeps W for the backward pass as it is held, in 8 bits; autograd would keep the dequantised one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, int8_OI: Tensor, scale_O1: Tensor) -> Tensor:
        ctx.save_for_backward(int8_OI, scale_O1)
        return linear(x, _weight(int8_OI, scale_O1, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override, unused-ignore]
        int8_OI, scale_O1 = ctx.saved_tensors
        return grad_y @ _weight(int8_OI, scale_O1, grad_y.dtype), None, None


def _weight(int8_OI: Tensor, scale_O1: Tensor, dtype: torch.dtype) -> Tensor:
    return int8_OI.to(dtype).mul_(scale_O1)
