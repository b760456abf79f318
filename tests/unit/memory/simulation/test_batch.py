"""The batch that is planned: the worst of the data at hand, or one that it could hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import CONFIG_MAPPING

from qmixlora.data import IGNORED
from qmixlora.errors import UserError
from qmixlora.memory import plan, plan_with_advice
from qmixlora.memory.architectures import config_of
from qmixlora.memory.simulation.batch import MADE_UP, MODEL_ALONE, batches_of, synthetic_batch
from qmixlora.recipe import Recipe, edited

from ..helpers import recipe_of


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], write_json: Callable[[str, Any], Path], tmp_path: Path) -> Recipe:
    """Twenty samples with answers of one to twenty words, two in a batch."""
    question = {"from": "human", "value": "<image>\nwhat color is it ?"}
    rows = []
    for index in range(20):
        Image.new("RGB", (28, 28), (index, 0, 0)).save(tmp_path / f"{index}.png")
        answer = {"from": "gpt", "value": " ".join(["red"] * (1 + index))}
        rows.append({"image": f"{index}.png", "conversations": [question, answer]})
    return make_recipe(data={"train": str(write_json("data.json", rows))}, train={"micro_batch_size": 2})


def test_the_longest_samples_of_the_data_at_hand_are_planned(recipe: Recipe) -> None:
    [batch] = batches_of(recipe, config_of(recipe.model), None)
    labels_BS = batch.inputs["labels"]
    assert [int(n) for n in (labels_BS != IGNORED).sum(dim=1)] == [21, 20]  # the two longest, each with its end
    assert batch.tokens == labels_BS.shape[1]


def test_a_batch_says_what_it_was_chosen_from(recipe: Recipe) -> None:
    [batch] = batches_of(recipe, config_of(recipe.model), None)
    assert f"largest {batch.tokens}" in batch.source and "20 samples" in batch.source and "median" in batch.source


def test_advice_is_for_the_worst_batch(recipe: Recipe) -> None:
    [batch] = batches_of(recipe, config_of(recipe.model), None)
    planned = plan_with_advice(recipe).plan
    assert planned.batch.to_dict() == batch.to_dict() and planned.peak == plan(recipe, batch=batch).peak > 0


def test_a_plan_without_its_data_says_so(recipe: Recipe) -> None:
    mistyped = edited(recipe, [f"data.train={recipe.data.train}".replace("data.json", "dat.json")])
    [batch] = batches_of(mistyped, config_of(recipe.model), None)
    assert f"there is no {mistyped.data.train} here. Did you mean {recipe.data.train}?" == batch.unmeasured
    assert batch.source == MADE_UP
    alone = edited(recipe, [f"data.train='{MODEL_ALONE}'"])
    for planned, tokens in ((mistyped, 64), (alone, None)):  # none was to measure
        assert batches_of(planned, config_of(recipe.model), tokens)[0].unmeasured is None


def test_samples_are_as_long_as_the_user_says(recipe: Recipe) -> None:
    [batch] = batches_of(recipe, config_of(recipe.model), 64)
    assert batch.tokens == 64


def test_images_of_a_family_that_is_not_known_are_refused() -> None:
    with pytest.raises(UserError, match="images of 'blip' models"):
        synthetic_batch(CONFIG_MAPPING["blip"](), recipe_of("x"), 1000)
