"""lm_head in 8 or 4 bits: the product with its dequantised weight, in both passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qmixlora.backbone import check_quantized, load_backbone
from qmixlora.backbone.levers.quantized_head import PiecewiseLinear, quantize_head
from qmixlora.errors import UserError
from qmixlora.recipe import Model

from .helpers import CPU, dequantised

ERRORS = {"int8": 0.012, "nf4": 0.12}  # of a weight drawn evenly, relative to its norm
KINDS = pytest.mark.parametrize("kind", ERRORS)
DTYPES = pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])


def a_head(kind: Any, dtype: torch.dtype) -> tuple[nn.Linear, PiecewiseLinear, Tensor]:
    """A linear layer, what quantising makes of it, and the weight (O x I) that it then stands for."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 40000, dtype=dtype).requires_grad_(False)
    head = quantize_head(linear, kind, CPU)
    return linear, head, torch.cat([dequantised(piece) for piece in head.pieces]).to(dtype)


@KINDS
def test_a_head_is_held_in_pieces(kind: str) -> None:
    _, head, _ = a_head(kind, torch.float32)
    assert [len(piece(torch.ones(1, 64))[0]) for piece in head.pieces] == [16384, 16384, 7232]


@KINDS
def test_no_piece_is_repacked_for_the_processor(kind: str) -> None:
    """bitsandbytes would repack weights for AVX-512 in evaluation."""
    _, head, _ = a_head(kind, torch.bfloat16)
    assert not any(getattr(piece, "support_avx512bf16_for_cpu", False) for piece in head.eval().pieces)


@KINDS
@DTYPES
def test_a_quantised_weight_is_near_the_heads(kind: str, dtype: torch.dtype, near: float) -> None:
    linear, _, weight_OI = a_head(kind, dtype)
    assert ((weight_OI - linear.weight).float().norm() / linear.weight.float().norm()) < ERRORS[kind]


@KINDS
@DTYPES
def test_the_head_computes_with_its_dequantised_weight(kind: str, dtype: torch.dtype, near: float) -> None:
    linear, head, weight_OI = a_head(kind, dtype)
    x = torch.randn(2, 3, 64, dtype=dtype)
    y, reference = head(x), nn.functional.linear(x, weight_OI, linear.bias)
    assert y.dtype == dtype and torch.allclose(y, reference, rtol=near, atol=near)


@KINDS
@DTYPES
def test_gradients_go_through_the_dequantised_weight(kind: str, dtype: torch.dtype, near: float) -> None:
    linear, head, weight_OI = a_head(kind, dtype)
    x = torch.randn(2, 3, 64, dtype=dtype, requires_grad=True)
    y, reference = head(x), nn.functional.linear(x, weight_OI, linear.bias)
    pull = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, pull)
    (expected,) = torch.autograd.grad(reference, x, pull)
    assert torch.allclose(gradient, expected, rtol=near, atol=near * expected.abs().max().item())


@KINDS
@DTYPES
def test_evaluation_computes_what_training_does(kind: str, dtype: torch.dtype, near: float) -> None:
    _, head, _ = a_head(kind, dtype)
    x = torch.randn(2, 3, 64, dtype=dtype, requires_grad=True)
    y = head.train()(x)
    with torch.no_grad():
        assert torch.equal(head.eval()(x), y)


def test_a_head_that_was_not_asked_for_is_noticed(deep: Path) -> None:
    model, _, anatomy = load_backbone(Model(id=str(deep), dtype="float32", quantize_lm_head="nf4"))
    check_quantized(model, anatomy)
    model.lm_head = model.get_output_embeddings().pieces[0]
    with pytest.raises(UserError, match="lm_head is quantised and should not be"):
        check_quantized(model, anatomy)
