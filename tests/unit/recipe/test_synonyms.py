"""Keys of other tools, and keys in the wrong section, are answered with the one that is meant."""

from __future__ import annotations

from typing import Any

import pytest

from qmixlora.errors import UserError
from qmixlora.recipe import Recipe, validate
from qmixlora.recipe.synonyms import SYNONYMS, meant_by

BASE = {"model": {"id": "m"}, "data": {"train": "d"}}


def message(**sections: dict[str, Any]) -> str:
    values: dict[str, Any] = {**BASE, **sections}
    for name, section in BASE.items():
        values[name] = {**section, **values[name]}
    with pytest.raises(UserError) as caught:
        validate(values, "recipe")
    return str(caught.value)


def test_every_synonym_is_of_a_key_that_recipes_have() -> None:
    for path in SYNONYMS:
        section, key = path.split(".")
        assert key in Recipe.model_fields[section].annotation.model_fields, path  # type: ignore[union-attr]


def test_no_word_is_a_synonym_of_two_keys() -> None:
    words = [word for synonyms in SYNONYMS.values() for word in synonyms]
    assert len(words) == len(set(words)) and all(meant_by(word.upper()) for word in words)


@pytest.mark.parametrize(
    ("section", "word", "key"),
    [
        ("train", "lr", "train.learning_rate"),
        ("adapter", "rank", "adapter.r"),
        ("train", "batch_size", "train.micro_batch_size"),
        ("train", "per_device_train_batch_size", "train.micro_batch_size"),
        ("data", "cutoff_len", "data.max_length"),
        ("model", "load-in-4bit", "model.quantization"),
        ("train", "num_workers", "data.num_workers"),  # of another section
        ("model", "max_length", "data.max_length"),
    ],
)
def test_a_key_of_another_tool_or_section_is_told_by_its_path(section: str, word: str, key: str) -> None:
    assert f"{section}.{word}: unknown key. Did you mean {key}?" in message(**{section: {word: 1}})


def test_a_misspelt_key_is_still_told_in_its_section() -> None:
    assert "train.learning_rat: unknown key. Did you mean 'learning_rate'?" in message(train={"learning_rat": 1})


def test_a_synonym_at_the_top_is_told_too() -> None:
    assert "learning_rate: unknown key. Did you mean train.learning_rate?" in message(learning_rate=1)  # type: ignore[arg-type]
