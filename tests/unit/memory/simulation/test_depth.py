"""Depth: a shallow model's step tells of the deep one's, byte for byte."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from qmixlora.memory import plan
from qmixlora.memory.architectures import config_of
from qmixlora.memory.simulation import depth, step
from qmixlora.memory.simulation.depth import shallow_model
from qmixlora.recipe import Recipe, edited

from ..helpers import QWEN_7B, recipe_of, small_qwen

HYBRID, WITH_CROSS_ATTENTION = "Qwen/Qwen3.5-0.8B", "meta-llama/Llama-3.2-11B-Vision-Instruct"


@pytest.mark.parametrize(
    ("adapter", "overrides"),
    [
        ({}, []),
        ({"pairing": "conditional", "gate": "straight_through", "route_on": "all"}, ["train.gradient_accumulation=1"]),
        pytest.param({"method": "lora", "r": 8}, ["train.checkpointing.every_n_layers=3"], marks=pytest.mark.long),
        pytest.param({}, ["train.checkpointing.enabled=false"], marks=pytest.mark.long),
        ({}, ["model.stream_layers=7", "model.offload_embeddings=true"]),
        pytest.param({}, ["train.checkpointing.offload=true"], marks=pytest.mark.long),
    ],
)
def test_shallow_models_give_what_the_deep_one_gives(
    tmp_path: Path, adapter: dict[str, Any], overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_qwen(10).save_pretrained(tmp_path)
    assert_same_plans(edited(recipe_of(str(tmp_path), adapter), overrides), monkeypatch)


@pytest.mark.parametrize(
    ("model", "depth", "overrides"),
    [
        pytest.param(HYBRID, 12, [], marks=pytest.mark.long),
        (HYBRID, 12, ["train.checkpointing.enabled=false"]),
        pytest.param(HYBRID, 12, ["train.checkpointing.every_n_layers=2"], marks=pytest.mark.long),
        pytest.param(WITH_CROSS_ATTENTION, 15, [], marks=pytest.mark.long),  # in every fifth layer, by its number
        (WITH_CROSS_ATTENTION, 15, ["train.checkpointing.enabled=false"]),
    ],
)
def test_layers_that_take_turns_are_simulated_once_each(
    model: str, depth: int, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = edited(recipe_of(model, {"method": "lora", "r": 8}), overrides)
    assert depth_of(recipe) == depth
    assert_same_plans(recipe, monkeypatch)


@pytest.mark.parametrize(("leading", "pattern", "depth"), [(0, "f", 3), (3, "l", 5), (2, "lf", 6), (0, "lfff", 12)])
def test_the_shallow_model_holds_what_leads_and_two_turns_of_what_repeats(
    leading: int, pattern: str, depth: int
) -> None:
    kinds = {"f": "full_attention", "l": "linear_attention"}
    text = (config := config_of(recipe_of(HYBRID).model)).get_text_config()
    repeats = -(-(24 - leading) // len(pattern))
    text.layer_types = [kinds[kind] for kind in ("f" * leading + pattern * repeats)[:24]]
    found = shallow_model(recipe_of(HYBRID), config, 1)
    assert found is not None and found.depth == depth


def test_layers_without_a_pattern_are_all_simulated() -> None:
    config = config_of(recipe_of(HYBRID).model)
    text = config.get_text_config()
    text.layer_types = random.Random(0).choices(["full_attention", "linear_attention"], k=text.num_hidden_layers)
    assert shallow_model(recipe_of(HYBRID), config, 1) is None


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter.target_modules=[layers.1.mlp.down_proj]"],
        ["adapter.target_modules=[layers.6.mlp.down_proj,layers.7.mlp.down_proj]"],
        ["model.keep=[layers.8]"],
    ],
)
def test_layers_that_the_recipe_tells_apart_are_all_simulated(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_qwen(10).save_pretrained(tmp_path)
    recipe = edited(recipe_of(str(tmp_path)), overrides)
    assert depth_of(recipe) is None
    assert_same_plans(recipe, monkeypatch)


@pytest.mark.parametrize(
    ("model", "depth"),
    [("google/gemma-3-4b-it", 3), ("google/gemma-4-E4B-it", None), ("google/gemma-4-31B-it", 18)],
)
def test_kinds_of_attention_need_a_turn_each_where_their_shapes_differ(model: str, depth: int | None) -> None:
    assert depth_of(recipe_of(model)) == depth


def test_streamed_layers_of_several_sizes_are_all_simulated() -> None:
    assert depth_of(edited(recipe_of(HYBRID), ["model.stream_layers=4"])) is None
    assert depth_of(edited(recipe_of(QWEN_7B), ["model.stream_layers=4"])) == 5


def test_the_methods_are_looked_at_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA may adapt layers that a mixture cannot route."""
    small_qwen(10).save_pretrained(tmp_path)
    looked_at: list[str] = []
    monkeypatch.setattr(depth, "_SHALLOW", {})  # what other tests have found
    monkeypatch.setattr(depth, "_found", lambda recipe, *_: looked_at.append(recipe.adapter.method))
    for method in ("mixlora", "lora", "mixlora"):
        depth_of(recipe_of(str(tmp_path), {"method": method, "r": 2}))
    assert looked_at == ["mixlora", "lora"]


def depth_of(recipe: Recipe) -> int | None:
    found = shallow_model(recipe, config_of(recipe.model), step.period_of(recipe), min(recipe.model.stream_layers, 2))
    return None if found is None else found.depth


def assert_same_plans(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from_shallow = plan(recipe, tokens=300)
    monkeypatch.setattr(step, "shallow_model", lambda *_: None)
    whole = plan(recipe, tokens=300)
    assert from_shallow.host == whole.host
    assert asdict(from_shallow.loading) == pytest.approx(asdict(whole.loading), abs=2**14)
    assert from_shallow.place == whole.place
    parts, expected = ({**asdict(one.parts), "gaps": 0} for one in (from_shallow, whole))  # gaps are a bound
    assert parts == pytest.approx(expected, abs=2**16)
