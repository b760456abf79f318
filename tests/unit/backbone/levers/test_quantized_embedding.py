"""Embeddings in 8 or 4 bits: rows of the dequantised table."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from qmixlora.backbone.levers.quantized_embedding import quantize_embedding

from .helpers import CPU

ERRORS = {"int8": 0.012, "nf4": 0.12}  # of a table drawn from a normal distribution, relative to its norm
SIZES = {"int8": 1.1, "nf4": 0.6}  # bytes a number, scales included
KINDS = pytest.mark.parametrize("kind", ERRORS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def a_table(kind: Any, dtype: torch.dtype) -> tuple[nn.Embedding, Any, Tensor]:
    """An embedding, what quantising makes of it, and all rows of that (V x D)."""
    torch.manual_seed(0)
    embedding = nn.Embedding(9000, 128, dtype=dtype).requires_grad_(False)
    table = quantize_embedding(copy.deepcopy(embedding), kind, CPU)
    return embedding, table, table(torch.arange(9000))


@KINDS
@DTYPES
def test_rows_are_those_of_the_whole_table(kind: str, dtype: torch.dtype) -> None:
    _, table, whole_VD = a_table(kind, dtype)
    ids = torch.tensor([[0, 7, 8999], [8192, 8191, 7]])
    assert table(ids).shape == (2, 3, 128)
    assert torch.equal(table(ids), whole_VD[ids])


@KINDS
@DTYPES
def test_rows_have_the_embeddings_dtype_and_are_near_its_own(kind: str, dtype: torch.dtype) -> None:
    embedding, _, whole_VD = a_table(kind, dtype)
    assert whole_VD.dtype == dtype
    assert ((whole_VD - embedding.weight).float().norm() / embedding.weight.float().norm()) < ERRORS[kind]


@KINDS
def test_a_row_is_read_as_of_a_weight(kind: str) -> None:
    """Gemma 4 reads the row of its padding."""
    _, table, whole_VD = a_table(kind, torch.bfloat16)
    assert torch.equal(table.weight[7, :], whole_VD[7]) and torch.equal(table.weight[7:9], whole_VD[7:9])
    assert table.weight.dtype == torch.bfloat16


@KINDS
def test_rows_are_scaled_as_the_models_own_lookup_scales_them(kind: str) -> None:
    """Gemma multiplies its rows by the square root of their width."""
    torch.manual_seed(0)
    lookup = Gemma3TextScaledWordEmbedding(11, 64, padding_idx=10, embed_scale=8.0).requires_grad_(False)
    scaled_VD = lookup(torch.arange(11))
    table = quantize_embedding(lookup, kind, CPU)  # type: ignore[arg-type]  # one of the two
    rows_ND = table(torch.tensor([3, 10]))
    assert (rows_ND - scaled_VD[[3, 10]]).norm() / scaled_VD[[3, 10]].norm() < ERRORS[kind]


@KINDS
def test_a_table_is_as_small_as_its_bits(kind: str) -> None:
    _, table, _ = a_table(kind, torch.float32)
    assert sum(buffer.nbytes for buffer in table.buffers()) < 9000 * 128 * SIZES[kind]


@DTYPES
def test_nf4_rows_are_what_bitsandbytes_makes_of_the_whole_table(dtype: torch.dtype) -> None:
    embedding, _, whole_VD = a_table("nf4", dtype)
    packed, state = bnb.functional.quantize_4bit(embedding.weight.data, blocksize=64, quant_type="nf4")
    assert torch.equal(whole_VD, bnb.functional.dequantize_4bit(packed, state))
