"""lm_head in 8 or 4 bits, in pieces: its output is as wide as the vocabulary, and so would be a dequantised copy. Where
it is tied to the input embeddings, its pieces are rows of their table.

Shapes: O out-features (words), I in-features (the decoder's width), ... any leading axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..nf4 import nf4_linear
from .int8_linear import Int8Linear
from .quantized_embedding import Int8Table, NF4Table

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


def quantize_head(head: nn.Linear, kind: Literal["int8", "nf4"], device: torch.device) -> PiecewiseLinear:
    """The layer in 8 or 4 bits on the device, where one piece of it at a time is in 16 bits on the way."""
    make = Int8Linear if kind == "int8" else nf4_linear
    weight_OI, bias_O = head.weight.detach(), None if head.bias is None else head.bias.detach()
    pieces = []
    for start in range(0, len(weight_OI), PIECE):
        part = slice(start, start + PIECE)
        pieces.append(make(weight_OI[part], None if bias_O is None else bias_O[part], device))
    return PiecewiseLinear(pieces, head.in_features, head.out_features)


class TableRows(nn.Module):
    """A frozen linear layer whose weight is a stretch of a table's rows, dequantised for each of its two products.

    The table is the embedding's, which alone registers it.
    """

    def __init__(self, table: Int8Table | NF4Table, part: slice) -> None:
        super().__init__()
        self._table, self.part = [table], part

    def weight(self) -> Tensor:
        """O x I, dequantised."""
        return self._table[0].rows(self.part)

    def forward(self, x: Tensor) -> Tensor:
        """... x I -> ... x O, in the dtype of `x`."""
        y: Tensor = _RowsProduct.apply(x, self)
        return y


class _RowsProduct(torch.autograd.Function):
    """x W^T, which keeps nothing for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: TableRows) -> Tensor:
        ctx.rows = rows
        return linear(x, rows.weight().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:  # type: ignore[override, unused-ignore]
        return grad_y @ ctx.rows.weight().to(grad_y.dtype), None


def tied_head(table: Int8Table | NF4Table) -> PiecewiseLinear:
    """The head of a model whose input embeddings are this table."""
    words, width = table.shape
    pieces = [TableRows(table, slice(start, min(start + PIECE, words))) for start in range(0, words, PIECE)]
    return PiecewiseLinear(pieces, width, words)
