"""A backbone that is not quantised as declared is refused, and so is what the CPU's kernel computes wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from qmixlora.backbone import Anatomy, check_quantized, load_backbone
from qmixlora.demo.backbone import make_config
from qmixlora.errors import UserError
from qmixlora.recipe import Model


@pytest.fixture
def loaded(backbone: Path) -> tuple[Any, Anatomy]:
    model, _, anatomy = load_backbone(Model(id=str(backbone), dtype="float32"))
    return model, anatomy


def quantized(kind: str, double: bool) -> nn.Module:
    return bnb.nn.Linear4bit(64, 64, bias=False, quant_type=kind, compress_statistics=double).to("cpu")


def test_a_quantised_layer_outside_the_decoder_is_refused(loaded: tuple[Any, Anatomy]) -> None:
    model, anatomy = loaded
    model.model.vision_tower.encoder.layers[0].self_attn.q_proj = quantized("nf4", True)
    with pytest.raises(UserError, match=r"vision_tower.*is quantised and should not be"):
        check_quantized(model, anatomy)


@pytest.mark.parametrize(("kind", "double"), [("fp4", True), ("nf4", False)])
def test_another_quantisation_than_double_nf4_is_refused(loaded: tuple[Any, Anatomy], kind: str, double: bool) -> None:
    model, anatomy = loaded
    model.model.language_model.layers[0].self_attn.q_proj = quantized(kind, double)
    with pytest.raises(UserError, match="not NF4 with double quantisation"):
        check_quantized(model, anatomy)


def test_the_cpu_kernel_gets_rows_of_partial_blocks_wrong_with_avx512() -> None:
    """So the refusal below has its reason: the day bitsandbytes gets them right, this test says so."""
    torch.manual_seed(0)
    weight = torch.randn(64, 160)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    by_rows = bnb.functional.dequantize_4bit(packed, state)
    state.shape = torch.Size((weight.numel(),))
    as_one = bnb.functional.dequantize_4bit(packed, state).view_as(weight)
    error = (as_one - weight).abs().max()
    assert error < 0.7
    if "512" in torch.backends.cpu.get_cpu_capability():
        assert (by_rows - weight).abs().max() > 2 * error


@pytest.fixture
def partial_blocks(tmp_path: Path, processor: Any) -> str:
    """The folder of a model with rows of 160 weights, which are no whole number of blocks."""
    config = make_config(processor.tokenizer, layers=1, width=64)
    config.text_config.intermediate_size = 160
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return str(tmp_path)


def test_rows_of_partial_blocks_are_refused_in_nf4(partial_blocks: str) -> None:
    with pytest.raises(UserError, match="rows of 160"):
        load_backbone(Model(id=partial_blocks, dtype="float32"))


def test_rows_of_partial_blocks_are_loaded_unquantised(partial_blocks: str) -> None:
    load_backbone(Model(id=partial_blocks, dtype="float32", quantization="none"))
