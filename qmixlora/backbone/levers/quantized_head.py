"""lm_head in 8 or 4 bits, in pieces: its output is as wide as the vocabulary, and so would be a dequantised copy.

Shapes: O out-features (words), I in-features (the decoder's width), ... any leading axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..nf4 import nf4_linear
from .quantized_embedding import quantize_rows

PIECE = 16384  # words in a piece: 134 MB in 16 bits at a width of 4,096, where a whole head can be more than 1 GB


class PiecewiseLinear(nn.Module):
    """A frozen linear layer as a list of quantised layers, each for some of the out-features.

    Both passes of a quantised layer hold its weight in 16 bits for a moment; here, one piece of it at a time.
    """

    def __init__(self, pieces: Sequence[nn.Module], in_features: int, out_features: int) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(pieces)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        """... x I -> ... x O, in the dtype of `x`."""
        return torch.cat([piece(x) for piece in self.pieces], dim=-1)


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


def quantize_head(head: nn.Linear, kind: Literal["int8", "nf4"], device: torch.device) -> PiecewiseLinear:
    """The layer in 8 or 4 bits on the device, where one piece of it at a time is in 16 bits on the way."""
    make = Int8Linear if kind == "int8" else nf4_linear
    weight_OI, bias_O = head.weight.detach(), None if head.bias is None else head.bias.detach()
    pieces = []
    for start in range(0, len(weight_OI), PIECE):
        part = slice(start, start + PIECE)
        pieces.append(make(weight_OI[part], None if bias_O is None else bias_O[part], device))
    return PiecewiseLinear(pieces, head.in_features, head.out_features)
