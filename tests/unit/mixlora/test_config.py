"""Configs that cannot work are refused."""

from __future__ import annotations

from typing import Any

import pytest

from qmixlora.mixlora import MixLoraConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 17}, "r=17"),
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
