"""Rows are as long as their batch makes them, however many images they have and whatever stands beside these."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

from qmixlora.data import IMAGE, Collator, Conversation, Lengths, taught
from qmixlora.data.checking.look import look_at
from qmixlora.data.images.opening import blank_image
from qmixlora.data.reading.store import FEATURES
from qmixlora.recipe import Data
from qmixlora.session import open_collator
from tests.families.case import Case
from tests.families.variant import variants

SIZES = [(64, 64), (500, 80), (80, 500), (333, 277), (800, 400)]
QUESTIONS = ("how", IMAGE, f"{IMAGE}how", f"{IMAGE}\n{IMAGE}\nhow", f"is {IMAGE} as {IMAGE} or {IMAGE}", f"how {IMAGE}")


def row_of(*questions: str) -> Conversation:
    """A conversation of these questions, with images of several sizes."""
    count = "".join(questions).count(IMAGE)
    turns = [
        turn for asked in questions for turn in ({"role": "user", "text": asked}, {"role": "assistant", "text": "a"})
    ]
    return {"turns": turns, "images": [blank_image(size) for size in (SIZES * 2)[:count]], "task": "t"}  # type: ignore[typeddict-item]


# fewer tokens of an image that is not alone; a token in front of texts without one; blanks between images and words;
# and one in which all adds up
@pytest.mark.parametrize("name", ["llava_onevision", "molmo2", "idefics2", "qwen3_vl"])
def test_rows_with_any_number_of_images_are_as_long_as_in_their_batch(name: str) -> None:
    collator = Collator(variants()[name].build()[1], 100_000)
    length = Lengths(collator)
    rows = [row_of(asked) for asked in QUESTIONS] + [row_of("how", asked) for asked in QUESTIONS]
    in_batches = [collator([row])["input_ids"].shape[1] for row in rows]
    assert [length(row) for row in rows] == in_batches
    assert [length(row, length.of_images(row)) for row in rows] == in_batches  # as a survey asks, when it knows these


@pytest.mark.parametrize("name", ["molmo2", "idefics2"])
def test_a_row_with_an_image_fits_where_rows_are_not_the_sum_of_text_and_images(name: str) -> None:
    """Molmo2 takes no mark of an image without an image, the look's own row of such a shape among them."""
    row = {**row_of(f"{IMAGE}how"), "tasks": [], "references": [], "learned": [], "origin": "o"}
    rows = Dataset.from_list([row], features=FEATURES)
    collator = Collator(variants()[name].build()[1], 1000)
    assert look_at(rows, Lengths(collator), Data(train="here", max_length=1000)).kept == [0]


def test_a_row_of_several_images_is_refused_by_the_length_that_its_batch_has() -> None:
    """LLaVA-OneVision cuts no tiles where there are several."""
    processor = variants()["llava_onevision"].build()[1]
    row: Conversation = {
        **row_of(f"{IMAGE}{IMAGE}{IMAGE}how"),
        "tasks": [],
        "references": [],
        "learned": [],
        "origin": "o",
    }  # type: ignore[typeddict-item, typeddict-unknown-key]
    longest = Collator(processor, 100_000)([row])["input_ids"].shape[1]
    rows = Dataset.from_list([row], features=FEATURES)  # type: ignore[list-item]
    kept = [
        look_at(rows, Lengths(Collator(processor, most)), Data(train="here", max_length=most)).kept
        for most in (longest, longest - 1)
    ]
    assert kept == [[0], []]


def test_images_that_take_more_than_the_budget_are_told(tmp_path: Path) -> None:
    """Qwen's strips have a token at least in their shorter side."""
    case = Case(variants()["qwen3_vl"], tmp_path)
    recipe = case.recipe(data={"max_image_tokens": 16, "train": str(case.data)})
    Image.new("RGB", (1600, 64)).save(tmp_path / "0.png")  # in place of one that was made with the data
    collator = open_collator(recipe)
    length = Lengths(collator)
    strip, square = length.over((1600, 64), 16), length.over((900, 900), 16)
    assert strip > 16 and square == 0
    warnings = taught(recipe.data, collator, ["train"]).facts(recipe.train).warnings
    assert any(
        f"1 samples show images of more tokens than data.max_image_tokens, 16 (up to {strip})" in w for w in warnings
    )
