"""The vision tower in 8 or 4 bits: its linear layers, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from transformers import AutoModelForImageTextToText

from qmixlora.backbone import find_anatomy, load_backbone
from qmixlora.backbone.levers import has_quantized_parts, without_levers
from qmixlora.backbone.levers.int8_linear import Int8Linear
from qmixlora.backbone.levers.quantized_vision import quantize_vision, vision_linears
from qmixlora.backbone.levers.vision import image_features
from qmixlora.memory.architectures import config_of
from qmixlora.recipe import Model, Recipe
from qmixlora.session import open_session

from .helpers import CPU

KINDS = pytest.mark.parametrize(("kind", "layer"), [("int8", Int8Linear), ("nf4", Linear4bit)])
ERRORS = {"int8": (0.02, 0.05), "nf4": (0.12, 0.4)}  # of the weights, and of the features of a random tower


def quantised(folder: Path, kind: Any) -> tuple[Any, Any]:
    with pytest.warns(UserWarning, match=f"vision tower is held in {kind}: its weights are "):
        model, _, anatomy = load_backbone(Model(id=str(folder), dtype="float32", quantize_vision=kind))
    return model, anatomy


@KINDS
def test_linear_layers_of_the_tower_alone_are_quantised(kind: str, layer: type, deep: Path) -> None:
    plain, _, anatomy = load_backbone(Model(id=str(deep), dtype="float32"))
    model, _ = quantised(deep, kind)
    paths = [path for path, _ in vision_linears(plain, anatomy)]
    assert paths and all(type(model.get_submodule(path)) is layer for path in paths)
    of_tower = {f"{anatomy.vision[0]}.{name}" for name, _ in model.get_submodule(anatomy.vision[0]).named_modules()}
    for name, module in plain.named_modules():
        if name not in paths and not list(module.children()):
            assert type(model.get_submodule(name)) is type(module), name
    assert set(paths) < of_tower


@KINDS
def test_features_are_near_those_of_the_tower(kind: str, layer: type, deep: Path) -> None:
    plain, _, _ = load_backbone(Model(id=str(deep), dtype="float32"))
    model, _ = quantised(deep, kind)
    size = plain.config.vision_config.image_size
    inputs = {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        right, near = (torch.stack(list(image_features(one, inputs)[0])) for one in (plain, model))
    assert 0 < (near - right).norm() / right.norm() < ERRORS[kind][1]


@KINDS
def test_what_the_weights_lost_is_told(kind: Any, layer: type) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"tower": nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)), "language": nn.Linear(64, 64)})
    nn.init.zeros_(model["tower"][1].weight)  # type: ignore[index]
    anatomy: Any = type("Anatomy", (), {"vision": ("tower",), "projectors": ()})
    error = quantize_vision(model, anatomy, kind, CPU)
    assert error is not None and error.layer == "tower.0"
    assert 0 < error.worst < ERRORS[kind][0] and error.mean == pytest.approx(error.worst / 2)
    assert type(model["language"]) is nn.Linear


def test_rows_that_are_not_whole_blocks_are_held_in_8_bits() -> None:
    model = nn.ModuleDict({"tower": nn.Sequential(nn.Linear(64, 80), nn.Linear(80, 64))})
    anatomy: Any = type("Anatomy", (), {"vision": ("tower",), "projectors": ()})
    quantize_vision(model, anatomy, "nf4", CPU)
    assert [type(layer) for layer in model["tower"]] == [Linear4bit, Int8Linear]  # type: ignore[arg-type]


def test_mergers_inside_a_tower_are_projectors_and_stay() -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config_of(Model(id="Qwen/Qwen2.5-VL-7B-Instruct")))
    anatomy = find_anatomy(model)
    paths = [path for path, _ in vision_linears(model, anatomy)]
    assert len(paths) == 32 * 5 and not any("merger" in path for path in paths)
    assert all(path.startswith(anatomy.vision[0]) for path in anatomy.projectors)


def test_what_stands_before_and_after_the_blocks_stays() -> None:
    """A tower casts its pixels to the dtype of the layer that embeds patches."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config_of(Model(id="LiquidAI/LFM2.5-VL-1.6B")))
    paths = [path for path, _ in vision_linears(model, find_anatomy(model))]
    layers = model.config.vision_config.num_hidden_layers
    assert type(model.model.vision_tower.embeddings.patch_embedding) is nn.Linear
    assert len(paths) == layers * 6 and all(".layers." in path for path in paths)


def test_modules_that_read_their_layers_weights_keep_them() -> None:
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    model = nn.ModuleDict({"tower": nn.ModuleList([attention, nn.Linear(64, 64)])})
    anatomy: Any = type("Anatomy", (), {"vision": ("tower",), "projectors": ()})
    quantize_vision(model, anatomy, "int8", CPU)
    x = torch.randn(1, 3, 64)
    assert attention(x, x, x)[0].shape == x.shape


def test_a_run_with_it_trains_its_projector_through_the_tower(recipe_of: Callable[..., Recipe]) -> None:
    session = open_session(recipe_of({"quantize_vision": "int8"}), [])
    trained = [name for name, parameter in session.model.named_parameters() if parameter.requires_grad]
    assert any("projector" in name for name in trained) and not any("vision" in name for name in trained)


def test_a_merged_checkpoint_has_the_towers_own_weights(recipe_of: Callable[..., Recipe]) -> None:
    spec = recipe_of({"quantize_vision": "nf4"}).model
    assert has_quantized_parts(spec) and not has_quantized_parts(without_levers(spec))
