"""Configs that cannot work are refused."""

from __future__ import annotations

from typing import Any

import pytest

from qmixlora.mixlora import MixLoraConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 17}, "r=17"),
        ({"r": "4"}, "r='4' is no whole number"),
        ({"num_factors": 8.0}, "num_factors=8.0 is no whole number"),
        ({"r": True}, "r=True is no whole number"),
        ({"alpha": "8"}, "alpha='8' is no number"),
        ({"alpha": float("nan")}, "alpha=nan is no number"),
        ({"alpha": -3}, "alpha=-3 must be above 0"),
        ({"dropout": None}, "dropout=None is no number"),
        ({"tasks": "abc"}, "tasks='abc' is no list of names"),
        ({"tasks": [1, 2]}, "is no list of names"),
        ({"static_modules": "o_proj"}, "static_modules='o_proj' is no list of names"),
        ({"image_tokens": ["x"]}, "is no list of ids"),
        ({"format_version": 99}, "of a later release: its format is 99"),
        ({"format_version": None}, "format_version=None is no whole number"),
        ({"gate": "soft"}, "gate='soft'"),
        ({"pairing": "none", "route_on": "image"}, "route_on='image'"),
        ({"gate": "weighted", "r": 1}, "needs r >= 2"),
        ({"route_on": "task"}, "need `tasks`"),
        ({"task_mix": 1.5, "tasks": ["a"]}, "task_mix=1.5"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"tasks": ["a", "a"]}, "duplicates"),
        ({"router": "model", "route_on": "instruction"}, "router='model' needs"),
        ({"router": "block", "pairing": "conditional"}, "router='block' needs"),
    ],
)
def test_bad_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixLoraConfig(**change)
