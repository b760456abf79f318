"""How far a card goes is found with few plans, for samples as they are in the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from qmixlora.errors import UserError
from qmixlora.memory import plan
from qmixlora.memory.architectures import config_of
from qmixlora.memory.largest import MOST_SAMPLES, MOST_TOKENS, largest, most_that_fit
from qmixlora.memory.planner import MARGIN
from qmixlora.memory.simulation.batch import synthetic_batch

from .helpers import recipe_of

FEW = 12  # plans: each takes a second


def small_internvl() -> Any:
    """Its images are of 16 tokens, or of 13 times as many, in tiles."""
    return CONFIG_MAPPING["internvl"](
        text_config={
            "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500,
        },
        vision_config={
            "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": [112, 112], "patch_size": [14, 14],
        },
        image_token_id=499, image_seq_length=16,
    )  # fmt: skip


def found(size: Callable[[int], int], start: int, room: int, limit: int, unit: int) -> int:
    """The most that fit, looked for with few plans."""
    asked: list[int] = []

    def counted(count: int) -> int:
        asked.append(count)
        return size(count)

    most = most_that_fit(counted, start, None, room, limit, unit)
    assert len(asked) <= FEW and len(set(asked)) == len(asked)
    return most


@pytest.mark.parametrize("start", [64, 300, 700, 5000, 40_000])
@pytest.mark.parametrize("shortest", [0, 500, 1000])
@pytest.mark.parametrize("room", [90, 420, 1010, 3000, 20_000, 40_000])
def test_the_longest_samples_are_found_though_short_ones_hold_no_image(start: int, shortest: int, room: int) -> None:
    def size(tokens: int) -> int:
        if tokens < shortest:
            raise UserError("It does not hold an image.", where="--tokens")
        return tokens

    longest = min(room, MOST_TOKENS) // 64 * 64
    assert found(size, start, room, MOST_TOKENS, 64) == (longest if longest >= shortest else 0)


@pytest.mark.parametrize("start", [1, 2, 8, 64])
@pytest.mark.parametrize("most", [0, 1, 3, 40, 63, 64])
def test_the_most_samples_are_found_where_the_peak_stays_the_same_at_first(start: int, most: int) -> None:
    """As long as the optimiser's own step takes the most."""
    kink = 10 * most // 2
    assert found(lambda samples: max(kink, 10 * samples), start, 10 * most + 5, MOST_SAMPLES, 1) == most


def test_where_nothing_can_be_planned_nothing_fits() -> None:
    def size(count: int) -> int:
        raise UserError("It does not hold an image.", where="--tokens")

    assert found(size, 2, 100, MOST_SAMPLES, 1) == 0


@pytest.mark.parametrize("image_tokens", [16, pytest.param(0, marks=pytest.mark.long)])
def test_samples_are_as_short_as_those_of_the_data(tmp_path: Path, image_tokens: int) -> None:
    """They need not hold the largest image that the model takes, of 208 tokens, or none at all."""
    small_internvl().save_pretrained(tmp_path)
    recipe = recipe_of(str(tmp_path))
    config = config_of(recipe.model)
    of_data = replace(synthetic_batch(config, recipe, 100, image_tokens), source="the worst of the training data")
    planned = plan(recipe, batch=of_data)
    card = int((planned.peak_with_loading + 2**22) / (1 - MARGIN))
    most = largest(recipe, config, planned, card, 0)
    assert most.micro_batch_size > 1 and most.tokens > 100
    for tokens, fits in ((most.tokens, True), (2 * most.tokens, False)):
        batch = synthetic_batch(config, recipe, tokens, image_tokens)
        assert batch.image_tokens == image_tokens and plan(recipe, batch=batch, card=card).fits is fits
