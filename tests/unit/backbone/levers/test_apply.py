"""Levers on a model: frozen weights in another place or precision, and the same loss and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from torch import nn

from qmixlora.adapter import adapter_config
from qmixlora.backbone import load_backbone
from qmixlora.backbone.levers import HostEmbedding, enable_checkpointing, host_tensors
from qmixlora.backbone.levers.int8_linear import Int8Linear
from qmixlora.backbone.levers.quantized_head import PiecewiseLinear
from qmixlora.loss import supervised_loss
from qmixlora.memory.simulation.account import Account
from qmixlora.memory.simulation.simulation import on_meta, simulated
from qmixlora.mixlora import device_of
from qmixlora.recipe import Model, Recipe
from qmixlora.session import open_session, with_fresh_adapter

from .helpers import ALL, CPU, LEVERS, META, PLACES, PRECISIONS, assert_same_step, dequantised, meta_model, step


@pytest.mark.parametrize("levers", [*PLACES, {"stream_layers": 5, "offload_embeddings": True}])
def test_other_places_change_no_bit(levers: dict[str, Any], recipe_of: Callable[..., Recipe]) -> None:
    assert_same_step(recipe_of({}), recipe_of(levers))


@pytest.mark.parametrize("levers", PRECISIONS)
def test_a_step_with_quantised_parts_is_one_with_dequantised_ones(
    levers: dict[str, Any], recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, gradients = step(recipe_of(levers))

    def dequantise(spec: Model, **placement: Any) -> Any:
        model, processor, anatomy = load_backbone(spec, **placement)
        head: Any = model.get_output_embeddings()
        if isinstance(head, PiecewiseLinear):
            plain = nn.Linear(head.in_features, head.out_features, bias=False)
            plain.weight = nn.Parameter(torch.cat([dequantised(piece) for piece in head.pieces]), requires_grad=False)
            model.set_output_embeddings(plain)
        table: Any = model.get_input_embeddings()
        if not isinstance(table, nn.Embedding):
            weight_VD = table(torch.arange(table.num_embeddings))
            model.set_input_embeddings(nn.Embedding.from_pretrained(weight_VD))
        for path, layer in model.get_submodule(anatomy.vision[0]).named_modules():
            if isinstance(layer, Int8Linear | bnb.nn.Linear4bit):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                plain.weight = nn.Parameter(dequantised(layer).view_as(plain.weight), requires_grad=False)
                plain.bias = None if layer.bias is None else nn.Parameter(layer.bias.data, requires_grad=False)
                model.set_submodule(f"{anatomy.vision[0]}.{path}", plain)
        return model, processor, anatomy

    monkeypatch.setattr("qmixlora.session.load_backbone", dequantise)
    other_loss, other_gradients = step(recipe_of(levers))
    assert torch.allclose(loss, other_loss, rtol=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, other_gradients[name], rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("levers", PRECISIONS)
def test_quantising_parts_changes_the_loss(levers: dict[str, Any], recipe_of: Callable[..., Recipe]) -> None:
    assert abs(step(recipe_of({}))[0] - step(recipe_of(levers))[0]) > 1e-6


@pytest.mark.parametrize("levers", LEVERS)
def test_levers_on_meta_take_no_memory(levers: dict[str, Any], deep: Path) -> None:
    model, _ = meta_model(deep, levers)
    assert sum(tensor.untyped_storage().nbytes() for tensor in host_tensors(model)) < 100
    assert all(tensor.device == META for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("levers", LEVERS)
def test_a_step_on_meta_has_gradients_and_looks_rows_up_where_the_table_lies(
    levers: dict[str, Any], deep: Path, recipe_of: Callable[..., Recipe]
) -> None:
    recipe = recipe_of(levers)
    backbone, anatomy = meta_model(deep, levers)
    looked_up: list[tuple[torch.device, torch.device]] = []
    table: Any = backbone.get_input_embeddings()
    lookup = table._lookup[0] if isinstance(table, HostEmbedding) else table
    lookup.register_forward_hook(lambda _, args, rows: looked_up.append((args[0].device, rows.device)))
    model = with_fresh_adapter(recipe, backbone, adapter_config(recipe.adapter, anatomy, ["plan", "other"]))
    enable_checkpointing(backbone, anatomy, recipe.train.checkpointing)
    model.train()
    ids_BS = torch.ones(2, 16, dtype=torch.long)
    labels_BS = torch.where(torch.arange(16) < 8, -100, ids_BS)
    inputs = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), "labels": labels_BS}
    with simulated(model.parameters(), Account()):
        supervised_loss(model, on_meta(inputs)).backward()
    assert any(p.grad is not None for p in model.parameters())
    device = CPU if "offload_embeddings" in levers else META
    assert set(looked_up) == {(device, device)}


def test_peft_models_know_their_device(recipe_of: Callable[..., Recipe]) -> None:
    session = open_session(recipe_of(ALL), [])
    assert isinstance(session.model, PeftModel) and device_of(session.model) == CPU
