"""Shipped recipes that are named after a card fit it, and say so truly."""

from __future__ import annotations

import re

import pytest

from qmixlora.device import GIB
from qmixlora.errors import CheckError
from qmixlora.memory import card_of, check_fit
from qmixlora.memory.architectures import config_of
from qmixlora.recipe import edited, load_recipe, shipped_recipes

MANY = 40  # recipes that are named after a card, at least


CHECKED = {name: card for name in shipped_recipes() if (card := card_of(name)) is not None}


SOON = ("llava-1.5-7b-rtx4060-8gb", "qwen2.5-vl-7b-rtx4060-8gb")  # the smallest cards are the tightest


@pytest.mark.parametrize(
    "name", [name if name in SOON else pytest.param(name, marks=pytest.mark.long) for name in CHECKED]
)
def test_a_recipe_for_a_card_fits_it_and_says_so(name: str) -> None:
    assert check_fit(name, shipped_recipes()[name], load_recipe(name)).fits


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("llava-1.5-7b-rtx4060-8gb", "rtx4060-8gb"),
        ("folder/llava-1.5-7b-rtx4060-8gb.yaml", "rtx4060-8gb"),
        ("folder/llava-1.5-7b-rtx4060-8gb.yml", "rtx4060-8gb"),
        ("folder-rtx4060-8gb/own.yml", None),
        ("llava-1.5", None),
    ],
)
def test_a_card_is_found_in_the_name_of_a_recipe_and_of_its_file(name: str, card: str | None) -> None:
    assert card_of(name) == card


def test_many_recipes_are_for_a_card() -> None:
    assert len(CHECKED) >= MANY


def test_recipes_are_for_many_families() -> None:
    assert len({config_of(load_recipe(name).model).model_type for name in CHECKED}) >= 7


def test_cards_of_every_size_have_recipes() -> None:
    sizes = [card.rpartition("-")[2] for card in CHECKED.values()]
    assert all(sizes.count(size) >= 2 for size in ("8gb", "12gb", "16gb", "24gb", "32gb"))


NAME = "llava-1.5-7b-rtx4060-8gb"


def test_a_recipe_that_does_not_fit_its_card_is_refused() -> None:
    recipe = edited(load_recipe(NAME), ["train.micro_batch_size=8"])
    with pytest.raises(CheckError, match="leaves less than 8% of the 8 GiB free"):
        check_fit(NAME, shipped_recipes()[NAME], recipe)


@pytest.mark.parametrize("share", [0.95, 1.05])
def test_a_recipe_that_predicts_another_peak_is_refused(share: float) -> None:
    text, recipe = shipped_recipes()[NAME], load_recipe(NAME)
    said = f"{check_fit(NAME, text, recipe).peak_with_loading / GIB * share:.1f} GiB"
    text = re.sub(r"[\d.]+ GiB", said, text, count=1)
    with pytest.raises(CheckError, match=rf"predicts {said}, the plan \d.\d GiB"):
        check_fit(NAME, text, recipe)


def test_a_recipe_that_predicts_nothing_is_refused() -> None:
    with pytest.raises(CheckError, match="predicts nothing"):
        check_fit(NAME, "", load_recipe(NAME))
