"""The smallest set of edits that fits: single edits are not enough, several together are."""

from __future__ import annotations

import pytest

from qmixlora.backbone.levers.table import LEVERS, Facts, to_the_end
from qmixlora.device import GIB
from qmixlora.memory import Advice, card_bytes, plan, plan_with_advice
from qmixlora.memory.together import Option, smallest_set
from qmixlora.recipe import Edit, edited

from .helpers import LLAVA_7B, recipe_of

CARD = card_bytes("rtx4060-8gb")
QWEN3_8B = recipe_of("Qwen/Qwen3-VL-8B-Instruct", optimizer="paged_adamw_8bit")


@pytest.fixture(scope="module")
def advice() -> Advice:
    return plan_with_advice(QWEN3_8B, card=CARD, tokens=2048)


@pytest.mark.long
def test_where_no_edit_alone_is_enough_some_together_are(advice: Advice) -> None:
    assert not advice.plan.fits and not any(saving.fits for saving in advice.savings)
    assert advice.smallest is not None and advice.smallest.plan.fits
    edit = str(advice.smallest.edit)
    assert plan(edited(QWEN3_8B, edit.split()), card=CARD, tokens=2048).peak == advice.smallest.plan.peak


@pytest.mark.long
def test_the_last_step_of_a_lever_may_be_part_of_the_smallest_set(advice: Advice) -> None:
    assert advice.smallest is not None and advice.smallest.learns_the_same
    assert advice.smallest.edit.values["model.stream_layers"] == 36  # of 36; its next step would be half of them
    assert [one["learns_the_same"] for one in advice.to_dict()["smallest"]] == [True]


@pytest.mark.long
def test_a_set_that_changes_what_is_learned_stands_beside_one_that_does_not() -> None:
    """Where the projector is the larger part, the fewest edits leave it out."""
    advice = plan_with_advice(edited(QWEN3_8B, ["model.stream_layers=20"]), card=int(7.6 * GIB), tokens=2048)
    first, second = advice.smallest, advice.smallest_that_learns_the_same
    assert first is not None and not first.learns_the_same and first.plan.fits
    assert second is not None and second.learns_the_same and second.plan.fits
    assert len(second.edit.values) > 1


@pytest.mark.long
def test_where_nothing_is_enough_no_set_is_made_up() -> None:
    recipe = edited(recipe_of(LLAVA_7B), ["train.optimizer=paged_adamw_8bit", "model.quantize_lm_head=nf4"])
    advice = plan_with_advice(recipe, card=GIB, tokens=700)
    assert advice.smallest is None and advice.smallest_that_learns_the_same is None


def test_of_sets_that_are_as_small_the_one_that_learns_the_same_is_found() -> None:
    recipe = recipe_of(LLAVA_7B)
    base = plan(recipe, card=6 * GIB, tokens=700)
    levers = {lever.key: lever for lever in LEVERS}
    edits = {
        "train.cache_features": Edit({"adapter.projector": "frozen", "train.cache_features": True}),
        "model.stream_layers": Edit({"model.stream_layers": 16}),
    }
    options = [
        Option(levers[key], edit, plan(edit.apply(recipe), card=6 * GIB, tokens=700)) for key, edit in edits.items()
    ]
    assert all(option.plan.fits for option in options)
    found = smallest_set(base, options, lambda edit: pytest.fail("a single edit is planned already"))
    assert found is not None and found.edit == edits["model.stream_layers"]


def test_the_last_step_of_a_lever_is_all_of_its_steps() -> None:
    levers = {lever.key: lever for lever in LEVERS}
    recipe = recipe_of(LLAVA_7B, micro_batch_size=8)
    last = to_the_end(levers["train.micro_batch_size"], recipe)
    assert last.values == {
        "train.micro_batch_size": 1,
        "train.gradient_accumulation": 8 * recipe.train.gradient_accumulation,
    }


def test_a_lever_that_always_has_a_next_step_ends_too() -> None:
    levers = {lever.key: lever for lever in LEVERS}
    last = to_the_end(levers["data.max_image_tokens"], recipe_of(LLAVA_7B), Facts(32, 1000))
    assert last.values == {"data.max_image_tokens": 600}
