"""Depth: a shallow model's step tells of the deep one's, byte for byte."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig

from qmixlora.memory import plan
from qmixlora.memory.architectures import config_of
from qmixlora.memory.simulation import step
from qmixlora.memory.simulation.depth import at_depth, shallow_models
from qmixlora.recipe import Recipe, edited

from ..helpers import recipe_of, small_qwen


@pytest.mark.parametrize(
    ("adapter", "overrides"),
    [
        ({}, []),
        ({"pairing": "conditional", "gate": "straight_through", "route_on": "all"}, ["train.gradient_accumulation=1"]),
        ({"method": "lora", "r": 8}, ["train.checkpointing.every_n_layers=3"]),
        ({}, ["train.checkpointing.enabled=false"]),
        ({}, ["model.stream_layers=7", "model.offload_embeddings=true"]),
        ({}, ["train.checkpointing.offload=true"]),
    ],
)
def test_shallow_models_give_what_the_deep_one_gives(
    tmp_path: Path, adapter: dict[str, Any], overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_qwen(10).save_pretrained(tmp_path)
    assert_same_plans(edited(recipe_of(str(tmp_path), adapter), overrides), monkeypatch)


@pytest.mark.parametrize(
    "overrides", [[], ["train.checkpointing.enabled=false"], ["train.checkpointing.every_n_layers=2"]]
)
def test_layers_that_take_turns_are_simulated_once_each(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    hybrid = "Qwen/Qwen3.5-0.8B"
    assert [model.depth for model in shallow_models(config_of(recipe_of(hybrid).model), 1)] == [3, 12]
    assert_same_plans(edited(recipe_of(hybrid, {"route_on": "instruction"}), overrides), monkeypatch)


def test_layers_that_lead_are_simulated_before_those_that_repeat() -> None:
    config = config_of(recipe_of("Qwen/Qwen3.5-0.8B").model)
    text = config.get_text_config()
    text.layer_types = ["full_attention"] * 3 + ["linear_attention", "full_attention"] * 10 + ["linear_attention"]
    [first, second] = shallow_models(config, 1)
    assert (first.depth, first.leading) == (3, 0)
    assert (second.depth, second.leading, second.window) == (6, 2, range(3, 5))
    assert at_depth(config, 6).get_text_config().layer_types == text.layer_types[:6]
    assert not shallow_models(no_pattern(config), 1)[1:]


def no_pattern(config: PretrainedConfig) -> PretrainedConfig:
    text = config.get_text_config()
    text.layer_types = random.Random(0).choices(["full_attention", "linear_attention"], k=text.num_hidden_layers)
    return config


def assert_same_plans(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from_shallow = plan(recipe, tokens=300)
    monkeypatch.setattr(step, "shallow_models", lambda config, period, streamed: [])
    whole = plan(recipe, tokens=300)
    assert from_shallow.host == whole.host
    assert asdict(from_shallow.loading) == pytest.approx(asdict(whole.loading), abs=2**14)
    assert from_shallow.place == whole.place
    parts, expected = ({**asdict(one.parts), "gaps": 0} for one in (from_shallow, whole))  # gaps are a bound
    assert parts == pytest.approx(expected, abs=2**16)
