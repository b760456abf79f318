"""The model without storage."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import torch
from transformers import AutoConfig

from qmixlora.backbone import nf4_linear
from qmixlora.memory import plan
from qmixlora.memory.simulation.skeleton import meta_backbone, tensors_of

from ..helpers import recipe_of


def test_tied_weights_count_once(wide: Path) -> None:
    config = AutoConfig.from_pretrained(wide)
    spec = recipe_of(str(wide)).model
    apart = plan(recipe_of(str(wide)), tokens=100).parts.kept_out_weights
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model, _ = meta_backbone(config, spec)
    model.tie_weights()
    keys = {tensor.untyped_storage()._cdata: tensor.nbytes for _, tensor in tensors_of(model)}
    assert sum(keys.values()) < apart + sum(
        t.nbytes for n, t in tensors_of(model) if "scales" in n or t.dtype == torch.uint8
    )


def test_a_layer_without_storage_has_the_bytes_of_a_real_one() -> None:
    real = bnb.nn.Linear4bit(256, 320, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    real.weight = bnb.nn.Params4bit(torch.randn(320, 256), requires_grad=False, quant_type="nf4").to("cpu")
    made = nf4_linear(torch.empty(320, 256, dtype=torch.bfloat16, device="meta"), None, torch.device("meta"))
    one, two = real.weight.quant_state, made.weight.quant_state
    assert made.weight.shape == real.weight.shape and two.absmax.shape == one.absmax.shape
    assert two.state2.absmax.shape == one.state2.absmax.shape and two.shape == one.shape
    assert made(torch.empty(2, 256, dtype=torch.bfloat16, device="meta")).shape == (2, 320)
