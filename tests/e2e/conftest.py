"""Recipe files and finished runs for the command line. A run is made once, and tests that change it take a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from rich.console import Console

from qmixlora.recipe import Recipe
from qmixlora.training import train


@pytest.fixture
def recipe_file(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(make_recipe().to_yaml(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished_run(
    make_recipe_in: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of a run of four steps with a method."""

    @cache
    def made(method: str) -> Path:
        recipe = make_recipe_in(tmp_path_factory.mktemp(method), adapter={"method": method})
        return train(recipe, console=Console(quiet=True))

    return made


@pytest.fixture
def copied_run(finished_run: Callable[[str], Path], tmp_path: Path) -> Path:
    """A MixLoRA run of the test's own."""
    return Path(shutil.copytree(finished_run("mixlora"), tmp_path / "copied"))


@pytest.fixture(scope="session")
def image(data: Path) -> Path:
    """An image of the test split."""
    return min((data / "images").glob("test-*.png"))
