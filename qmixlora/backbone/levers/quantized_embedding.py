"""Tables of rows in 8 or 4 bits, of which only the rows that are looked up are dequantised.

bitsandbytes' own (`Embedding8bit`, `EmbeddingNF4`) refuse `state_dict()`, which PEFT calls to save an adapter.

Shapes: V rows (words), D width, C scales of a row (64 numbers each), N rows looked up, ... any axes of ids.
"""

from __future__ import annotations

from typing import Literal

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from ..nf4 import BLOCK

ROWS = 8192  # rows at a time on their way from 16 bits


class Int8Embedding(nn.Module):
    """An embedding held as whole numbers of 8 bits, with an fp32 scale for each row."""

    weight: Tensor  # V x D, int8
    scale: Tensor  # V x 1, fp32

    def __init__(self, weight_VD: Tensor, device: torch.device) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight_VD.shape
        self.dtype = weight_VD.dtype
        int8_VD, scale_V1 = quantize_rows(weight_VD, device)
        self.register_buffer("weight", int8_VD)
        self.register_buffer("scale", scale_V1)

    def forward(self, ids: Tensor) -> Tensor:
        """... ids -> ... x D, in the dtype of the embedding that was quantised."""
        return (self.weight[ids] * self.scale[ids]).to(self.dtype)


class NF4Embedding(nn.Module):
    """An embedding in NF4, its scales in fp32: a row's own blocks, so that rows can be taken out."""

    weight: Tensor  # V x D/2, uint8: two numbers in a byte
    scale: Tensor  # V x C, fp32

    def __init__(self, weight_VD: Tensor, device: torch.device) -> None:
        super().__init__()
        rows, width = weight_VD.shape
        assert width % BLOCK == 0, "a row is whole blocks"
        self.num_embeddings, self.embedding_dim, self.dtype = rows, width, weight_VD.dtype
        self.register_buffer("weight", torch.empty(rows, width // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(rows, width // BLOCK, device=device))
        if device.type == "meta":
            return
        for start in range(0, rows, ROWS):
            part = slice(start, start + ROWS)
            packed, state = bnb.functional.quantize_4bit(
                weight_VD[part].to(device), blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
            )
            self.weight[part] = packed.view(-1, width // 2)
            self.scale[part] = state.absmax.view(-1, width // BLOCK)

    def forward(self, ids: Tensor) -> Tensor:
        """... ids -> ... x D, in the dtype of the embedding that was quantised."""
        packed_N, scale_N = self.weight[ids].view(-1, 1), self.scale[ids].view(-1)
        state = bnb.functional.QuantState(
            absmax=scale_N,
            shape=torch.Size((ids.numel(), self.embedding_dim)),
            dtype=self.dtype,
            blocksize=BLOCK,
            quant_type="nf4",
        )
        rows_ND: Tensor = bnb.functional.dequantize_4bit(packed_N, state)
        return rows_ND.view(*ids.shape, self.embedding_dim)


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
) -> Int8Embedding | NF4Embedding:
    """The embedding in 8 or 4 bits on the device."""
    make = Int8Embedding if kind == "int8" else NF4Embedding
    return make(embedding.weight.detach(), device)
