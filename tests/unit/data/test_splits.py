"""Splits: sources of their own, or cut from the training data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qmixlora.data import load_split
from qmixlora.errors import UserError
from qmixlora.recipe import Columns, Data, Recipe, edited


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], write_json: Callable[[str, Any], Path]) -> Recipe:
    """A hundred samples without images, of two tasks."""
    rows = []
    for index in range(100):
        turns = [{"from": "human", "value": f"what ? {index}"}, {"from": "gpt", "value": "red"}]
        rows.append({"task": "ab"[index % 2], "conversations": turns})
    return make_recipe(data={"train": str(write_json("data.json", rows)), "validation": None, "test": None})


def questions(recipe: Recipe, split: str) -> set[str]:
    return {row["turns"][0]["text"] for row in load_split(recipe.data, split)}


def test_a_share_and_a_number_are_cut_from_the_training_data(recipe: Recipe) -> None:
    cut = edited(recipe, ["data.validation=0.1", "data.test=20"])
    parts = {split: questions(cut, split) for split in ("train", "validation", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 70, "validation": 10, "test": 20}
    assert set.union(*parts.values()) == questions(recipe, "train")


def test_every_look_at_a_split_is_the_same_and_the_seed_changes_it(recipe: Recipe) -> None:
    cut = edited(recipe, ["data.validation=0.1"])
    assert questions(cut, "validation") == questions(cut, "validation")
    assert questions(cut, "validation") != questions(edited(cut, ["data.split_seed=1"]), "validation")


def test_a_recipe_that_is_written_keeps_its_shares(recipe: Recipe) -> None:
    cut = edited(recipe, ["data.validation=0.1"]).with_absolute_paths()
    assert "validation: 0.1" in cut.to_yaml()


@pytest.mark.parametrize("amount", ["0", "-1", "true"])
def test_amounts_that_mean_nothing_are_refused(recipe: Recipe, amount: str) -> None:
    with pytest.raises(UserError, match="validation"):
        edited(recipe, [f"data.validation={amount}"])


def test_more_than_there_is_cannot_be_cut(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="cannot be cut"):
        load_split(edited(recipe, ["data.validation=100"]).data, "train")


def test_a_split_that_is_not_there_is_named_with_those_that_are(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="no split 'test'") as refused:
        load_split(recipe.data, "test")
    assert "train" in str(refused.value)


@pytest.fixture
def source(data: Path) -> Data:
    return Data(train=str(data / "train.json"), test=str(data / "test.json"))


def test_every_split_is_its_own_file(source: Data) -> None:
    assert len(load_split(source, "train")) > len(load_split(source, "test")) > 0


@pytest.mark.parametrize("split", ["validation", "image_root"])
def test_a_split_that_the_recipe_lacks_is_named_with_those_that_it_has(source: Data, split: str) -> None:
    with pytest.raises(UserError, match=f"no split '{split}'") as caught:
        load_split(source, split)
    assert "train, test" in str(caught.value.fix)


def test_a_split_is_read_as_the_recipe_says(tmp_path: Path) -> None:
    lines = [{"q": "what ?", "a": 0, "o": ["x", "y"], "set": 7}, {"q": "what ?"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    columns = Columns(question="q", answer="a", options="o")
    data = Data(
        train=str(tmp_path / "t.jsonl"),
        columns=columns,
        template="{options} {question}",
        task_field="set",
        on_bad_sample="skip",
    )
    [row] = load_split(data, "train")
    assert [turn["text"] for turn in row["turns"]] == ["A. x\nB. y what ?", "A"] and row["task"] == "7"
