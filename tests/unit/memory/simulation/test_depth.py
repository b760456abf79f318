"""Depth: a shallow model's step tells of the deep one's, byte for byte."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from qmixlora.memory import plan
from qmixlora.memory.simulation import step
from qmixlora.recipe import edited

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
    recipe = edited(recipe_of(str(tmp_path), adapter), overrides)
    from_shallow = plan(recipe, tokens=300)
    monkeypatch.setattr(step, "shallow_depths", lambda config, period: [10])
    whole = plan(recipe, tokens=300)
    assert from_shallow.host == whole.host
    assert asdict(from_shallow.loading) == pytest.approx(asdict(whole.loading), abs=2**14)
    assert from_shallow.place == whole.place
    parts, expected = ({**asdict(one.parts), "gaps": 0} for one in (from_shallow, whole))  # gaps are a bound
    assert parts == pytest.approx(expected, abs=2**16)
