"""Tables of rows in 8 or 4 bits, of which only the rows that are needed are dequantised: those that are looked up, or
where lm_head is tied to the embeddings, those of a piece of it.

bitsandbytes' own (`Embedding8bit`, `EmbeddingNF4`) refuse `state_dict()`, which PEFT calls to save an adapter.

Shapes: V rows (words), D width, C scales of a row (64 numbers each), N rows looked up, ... any axes of ids.
"""

from __future__ import annotations

from typing import Any, Literal

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from ..nf4 import BLOCK

ROWS = 8192  # rows at a time on their way from 16 bits
Rows = Tensor | slice  # positions of rows, or a stretch of them


class Int8Table(nn.Module):
    """Rows held as whole numbers of 8 bits, with an fp32 scale for each."""

    held: Tensor  # V x D, int8
    scale: Tensor  # V x 1, fp32

    def __init__(self, weight_VD: Tensor, device: torch.device) -> None:
        super().__init__()
        self.shape, self.dtype = weight_VD.shape, weight_VD.dtype
        int8_VD, scale_V1 = quantize_rows(weight_VD, device)
        self.register_buffer("held", int8_VD)
        self.register_buffer("scale", scale_V1)

    def rows(self, which: Rows) -> Tensor:
        """N x D, in the dtype of the table that was quantised."""
        return (self.held[which] * self.scale[which]).to(self.dtype)


class NF4Table(nn.Module):
    """Rows in NF4, their scales in fp32: a row's own blocks, so that rows can be taken out."""

    held: Tensor  # V x D/2, uint8: two numbers in a byte
    scale: Tensor  # V x C, fp32

    def __init__(self, weight_VD: Tensor, device: torch.device) -> None:
        super().__init__()
        self.shape, self.dtype = weight_VD.shape, weight_VD.dtype
        rows, width = weight_VD.shape
        assert width % BLOCK == 0, "a row is whole blocks"
        self.register_buffer("held", torch.empty(rows, width // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(rows, width // BLOCK, device=device))
        if device.type == "meta":
            return
        for start in range(0, rows, ROWS):
            part = slice(start, start + ROWS)
            packed, state = bnb.functional.quantize_4bit(
                weight_VD[part].to(device), blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
            )
            self.held[part] = packed.view(-1, width // 2)
            self.scale[part] = state.absmax.view(-1, width // BLOCK)

    def rows(self, which: Rows) -> Tensor:
        """N x D, in the dtype of the table that was quantised."""
        held_ND, scale_NC = self.held[which], self.scale[which]
        state = bnb.functional.QuantState(
            absmax=scale_NC.view(-1),
            shape=torch.Size((len(held_ND), self.shape[1])),
            dtype=self.dtype,
            blocksize=BLOCK,
            quant_type="nf4",
        )
        rows_ND: Tensor = bnb.functional.dequantize_4bit(held_ND.view(-1, 1), state)
        return rows_ND


class QuantizedEmbedding(nn.Module):
    """An embedding over a table: the model's own lookup, scales and all, in the rows that are asked for."""

    def __init__(self, lookup: nn.Embedding, table: Int8Table | NF4Table) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.shape
        self.table = table
        device = table.held.device
        lookup.weight = nn.Parameter(torch.empty(0, self.embedding_dim, device="meta"), requires_grad=False)
        lookup.padding_idx = None  # matters to gradients alone, and would have to be among the rows
        for name, buffer in list(lookup.named_buffers()):  # such as Gemma's scale
            setattr(lookup, name, buffer.to(device))
        self._lookup = [lookup]  # in a list: only modules themselves are registered

    @property
    def weight(self) -> _Weight:
        """The table as models index a weight (Gemma 4 reads the row of its padding)."""
        return _Weight(self.table)

    def forward(self, ids: Tensor) -> Tensor:
        """... ids -> ... x D, in the dtype of the embedding that was quantised."""
        rows_ND = self.table.rows(ids.flatten())
        own = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        looked_up: Tensor = torch.func.functional_call(self._lookup[0], {"weight": rows_ND}, (own,))
        return looked_up


class _Weight:
    """A table that is read as a weight: dequantised rows by one position, or a stretch of them."""

    def __init__(self, table: Int8Table | NF4Table) -> None:
        self.table, self.shape, self.dtype, self.device = table, table.shape, table.dtype, table.held.device

    def __getitem__(self, index: Any) -> Tensor:
        row, *others = index if isinstance(index, tuple) else (index,)
        one = isinstance(row, int)
        rows_ND = self.table.rows(slice(row, row + 1) if one else row)
        return (rows_ND[0] if one else rows_ND)[(..., *others)]


def quantize_rows(weight_VD: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(V x D int8, V x 1 fp32) on the device: each row over 127 steps up to its largest number, rounded to nearest.

    Some rows at a time are there in more than 8 bits.
    """
    int8_VD = torch.empty(weight_VD.shape, dtype=torch.int8, device=device)
    scale_V1 = torch.empty(len(weight_VD), 1, device=device)
    if device.type == "meta":
        return int8_VD, scale_V1
    for start in range(0, len(weight_VD), ROWS):
        part = slice(start, start + ROWS)
        rows = weight_VD[part].to(device).float()
        scale_V1[part] = (rows.abs().amax(dim=1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        int8_VD[part] = (rows / scale_V1[part]).round_()
    return int8_VD, scale_V1


def quantize_embedding(
    embedding: nn.Embedding, kind: Literal["int8", "nf4"], device: torch.device
) -> QuantizedEmbedding:
    """The embedding in 8 or 4 bits on the device; what is given loses its weight."""
    make = Int8Table if kind == "int8" else NF4Table
    return QuantizedEmbedding(embedding, make(embedding.weight.detach(), device))
