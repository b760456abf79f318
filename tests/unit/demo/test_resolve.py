"""Recipes that name the embedded model and data, and those that do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from qmixlora.demo import dataset, resolve
from qmixlora.recipe import EMBEDDED, Edit, Recipe

QUIET = Console(quiet=True)


def test_a_recipe_with_its_own_model_and_data_comes_back_as_it_is(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    assert resolve(recipe, None, QUIET) is recipe


def test_embedded_data_is_made_in_the_folder_and_named_by_split(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "SPLITS", {"train": 1, "validation": 1, "test": 1})
    recipe = Edit({"data.train": EMBEDDED}).apply(make_recipe())
    resolved = resolve(recipe, tmp_path / "set", QUIET)
    assert resolved.model == recipe.model
    files = {split: getattr(resolved.data, split) for split in ("train", "validation", "test")}
    assert files == {split: str(tmp_path / "set" / f"{split}.json") for split in files}
    assert all(Path(file).is_file() for file in files.values())
