"""Samples as a run learns from them, decoded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from qmixlora.cli.inspect import inspect

from qmixlora.data import IMAGE, load_split
from qmixlora.errors import UserError
from qmixlora.files import write_json
from qmixlora.inspection.samples import DecodedSample, decode_samples
from qmixlora.recipe import Recipe


def text_of(sample: DecodedSample, kind: str) -> str:
    return " ".join(text for own, text in sample.pieces if own == kind)


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    return make_recipe()


def test_the_answer_is_supervised_and_the_question_routes(recipe: Recipe) -> None:
    row = load_split(recipe.data, "train")[0]
    (sample,) = decode_samples(recipe, "train", 1)
    question, answer = (turn["text"].replace(IMAGE, "").strip() for turn in row["turns"])
    assert sample.task == row["task"]
    assert answer in text_of(sample, "supervised") and answer not in text_of(sample, "routing").split()
    assert question in text_of(sample, "routing")


def test_the_tokens_of_an_image_are_one_piece(recipe: Recipe) -> None:
    (sample,) = decode_samples(recipe, "train", 1)
    assert [text for _, text in sample.pieces if "image tokens" in text] == ["[4 image tokens] "]


def test_no_more_samples_are_decoded_than_there_are(recipe: Recipe) -> None:
    assert len(list(decode_samples(recipe, "test", 3))) == 3
    assert len(list(decode_samples(recipe, "test", 1000))) == len(load_split(recipe.data, "test"))


def test_a_split_that_the_recipe_lacks_is_refused(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="no split 'validation'"):
        next(decode_samples(recipe, "validation", 1))


def test_the_token_that_ends_an_answer_is_shown(recipe: Recipe) -> None:
    (sample,) = decode_samples(recipe, "train", 1)
    assert sample.end_token == "<eos>" and text_of(sample, "supervised").strip().endswith("<eos>")
    assert sample.notes == ["Every answer ends in '<eos>', which generation stops at."]


def test_a_conversation_is_shown_with_the_task_of_every_answer(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "human", "value": "what is it ?"}, {"from": "gpt", "value": "red"}] * 2
    (tmp_path / "talk.json").write_text(json.dumps([{"task": ["color", "digit"], "conversations": turns}]))
    recipe = make_recipe(data={"train": str(tmp_path / "talk.json"), "test": None})
    (sample,) = decode_samples(recipe, "train", 1)
    assert sample.task == ["color", "digit"]
    write_json(tmp_path / "recipe.json", recipe.model_dump(mode="json", exclude_defaults=True))
    inspect(str(tmp_path / "recipe.json"), samples=1)
    assert "color, digit  " in capsys.readouterr().out
