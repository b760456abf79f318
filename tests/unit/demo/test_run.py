"""The demonstration replaces the run of an earlier one, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qmixlora.demo.run import _make_room
from qmixlora.errors import UserError
from qmixlora.recipe import Recipe
from qmixlora.training.owner import owned


@pytest.fixture
def demo_recipe(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Recipe:
    return make_recipe(data={"train": "embedded"}, train={"output": str(tmp_path / "run")})


def left(recipe: Recipe, learned_from: str, make_recipe: Callable[..., Recipe]) -> Path:
    """The folder of a run on some data."""
    folder = Path(recipe.train.output)
    folder.mkdir()
    (folder / "recipe.yaml").write_text(make_recipe(data={"train": learned_from}).to_yaml(), encoding="utf-8")
    return folder


def test_the_run_of_an_earlier_demo_makes_room(
    demo_recipe: Recipe, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    folder = left(demo_recipe, str(tmp_path / "data" / "train.json"), make_recipe)
    _make_room(demo_recipe, tmp_path)
    assert not folder.exists()
    _make_room(demo_recipe, tmp_path)  # nor need there be one


def test_a_run_of_somebody_elses_stays(demo_recipe: Recipe, make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    folder = left(demo_recipe, "mine.json", make_recipe)
    with pytest.raises(UserError, match="no demo has made"):
        _make_room(demo_recipe, tmp_path)
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]


def test_what_is_no_run_stays(demo_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(UserError, match="no demo has made"):
        _make_room(demo_recipe, tmp_path)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_a_demo_that_is_still_going_on_keeps_its_run(
    demo_recipe: Recipe, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    folder = left(demo_recipe, str(tmp_path / "data" / "train.json"), make_recipe)
    with owned(folder), pytest.raises(UserError, match="in use"):
        _make_room(demo_recipe, tmp_path)
    assert (folder / "recipe.yaml").is_file()
