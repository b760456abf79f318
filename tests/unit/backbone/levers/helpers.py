"""A training step with levers, on a real model and on one without storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from qmixlora.backbone import find_anatomy, nf4_linear
from qmixlora.backbone.levers import apply_levers, enable_checkpointing
from qmixlora.backbone.levers.int8_linear import Int8Linear
from qmixlora.data import load_split
from qmixlora.loss import supervised_loss
from qmixlora.recipe import Model, Recipe
from qmixlora.session import open_session

CPU, META = torch.device("cpu"), torch.device("meta")
ALL = {"stream_layers": 3, "offload_embeddings": True, "quantize_lm_head": "nf4"}
PLACES: list[dict[str, Any]] = [{"stream_layers": 4}, {"stream_layers": 3}, {"offload_embeddings": True}]
PRECISIONS: list[dict[str, Any]] = [
    {"quantize_lm_head": "nf4"},
    {"quantize_lm_head": "int8"},
    {"quantize_embeddings": "nf4"},
    {"quantize_embeddings": "int8"},
    {"quantize_vision": "nf4"},
    {"quantize_vision": "int8"},
]
LEVERS = [*PLACES, *PRECISIONS, ALL]


def step(recipe: Recipe, checkpointing: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the second of two steps with an adapter whose factors all have a gradient."""
    rows = load_split(recipe.data, "train")
    session = open_session(recipe, sorted(set(rows["task"])))
    if checkpointing:
        enable_checkpointing(session.backbone, session.anatomy, recipe.train.checkpointing)
    model = session.model.train()
    for name, parameter in sorted(model.named_parameters()):
        if "mixlora_B" in name or "lora_B" in name:
            torch.manual_seed(len(name))
            nn.init.normal_(parameter, std=0.1)
    for start in (0, 4):
        model.zero_grad()
        loss = supervised_loss(model, session.collator([rows[index] for index in range(start, start + 4)]))
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    return loss.detach(), gradients


def assert_same_step(one: Recipe, other: Recipe, checkpointing: bool = True) -> None:
    (loss, gradients), (other_loss, other_gradients) = step(one, checkpointing), step(other, checkpointing)
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, other_gradients[name]), name


def dequantised(piece: Any) -> Tensor:
    if isinstance(piece, Int8Linear):
        return piece.weight.float() * piece.scale
    return bnb.functional.dequantize_4bit(piece.weight.data, piece.weight.quant_state)


def meta_model(folder: Path, levers: dict[str, Any]) -> tuple[Any, Any]:
    """As the planner makes it: the skeleton with NF4 layers without storage, its levers applied."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    anatomy = find_anatomy(model)
    for path in anatomy.targets:
        linear: Any = model.get_submodule(path)
        model.set_submodule(path, nf4_linear(linear.weight, linear.bias, META))
    apply_levers(model, anatomy, Model(id=str(folder), dtype="float32", **levers), META)
    return model, anatomy
