"""Advice: edits that are planned like the recipe itself, and how far a card goes."""

from __future__ import annotations

import json

import pytest

from qmixlora.device import GIB
from qmixlora.errors import UserError
from qmixlora.memory import Advice, card_bytes, plan, plan_with_advice
from qmixlora.recipe import edited

from .helpers import LLAVA_7B, recipe_of


def test_a_tied_model_is_told_so() -> None:
    recipe = recipe_of("Qwen/Qwen2.5-VL-3B-Instruct", optimizer="paged_adamw_8bit")
    with pytest.raises(UserError, match="one tensor"):
        plan(edited(recipe, ["model.offload_embeddings=true"]), tokens=600)


@pytest.mark.long
def test_a_tied_model_gets_no_advice_that_fails() -> None:
    recipe = recipe_of("Qwen/Qwen2.5-VL-3B-Instruct", optimizer="paged_adamw_8bit")
    edits = [str(saving.edit) for saving in plan_with_advice(recipe, tokens=600).savings]
    tables = [edit for edit in edits if "lm_head" in edit or "embeddings" in edit]
    assert tables == ["model.quantize_lm_head=nf4"]  # the one table, by its one key


CARD = card_bytes("rtx3060-12gb")
RECIPE = recipe_of(LLAVA_7B, micro_batch_size=4, gradient_accumulation=4)


@pytest.fixture(scope="module")
def advice() -> Advice:
    return plan_with_advice(RECIPE, card=CARD, tokens=700)


@pytest.mark.long
def test_a_plan_that_fits_leaves_more_than_the_margin(advice: Advice) -> None:
    told = advice.to_dict()
    assert told["fits"] and told["card_gib"] == CARD / GIB and told["margin_gib"] > told["needed_margin_gib"]


@pytest.mark.long
def test_a_recipe_that_fits_needs_no_set_of_edits(advice: Advice) -> None:
    assert advice.plan.fits and advice.smallest is None and advice.to_dict()["smallest"] == []


def test_advice_can_be_pasted_as_overrides(advice: Advice) -> None:
    edits = [entry["edit"] for entry in advice.to_dict()["advice"]]
    assert "train.micro_batch_size=2 train.gradient_accumulation=8" in edits
    for edit, saving in zip(edits, advice.savings, strict=True):
        assert edited(RECIPE, edit.split()) == saving.edit.apply(RECIPE)


def test_advice_stands_in_the_order_of_what_it_saves(advice: Advice) -> None:
    saved = [saving.saves for saving in advice.savings]
    assert len(saved) > 3 and saved == sorted(saved, reverse=True)


def test_advice_saves_what_the_edited_recipes_plan_says(advice: Advice) -> None:
    saving = next(saving for saving in advice.savings if saving.lever.key == "train.optimizer")
    assert advice.plan.peak - plan(saving.edit.apply(RECIPE), tokens=700).peak == saving.saves


def test_advice_is_json_in_gib(advice: Advice) -> None:
    told = json.loads(json.dumps(advice.to_dict()))
    assert [entry["saves_gib"] * GIB for entry in told["advice"]] == [saving.saves for saving in advice.savings]


def test_the_most_samples_fit_and_one_more_does_not(advice: Advice) -> None:
    assert advice.largest is not None
    most = advice.largest.micro_batch_size
    for samples, fits in ((most, True), (most + 1, False)):
        recipe = edited(RECIPE, [f"train.micro_batch_size={samples}"])
        assert plan(recipe, card=CARD, tokens=700).fits is fits


def test_the_longest_samples_fit_and_longer_ones_do_not(advice: Advice) -> None:
    assert advice.largest is not None
    longest = advice.largest.tokens
    for tokens, fits in ((longest, True), (longest + 128, False)):
        assert plan(RECIPE, card=CARD, tokens=tokens).fits is fits


@pytest.mark.long
def test_where_nothing_fits_an_edit_may() -> None:
    small = plan_with_advice(recipe_of(LLAVA_7B), card=6 * GIB, tokens=700)
    assert not small.plan.fits and small.largest is not None and small.largest.micro_batch_size == 0
    assert any(saving.fits for saving in small.savings)
