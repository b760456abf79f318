"""Recipe files and finished runs for the command line. A run is made once, and tests that change it take a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console

from qmixlora.demo.backbone import save_backbone
from qmixlora.demo.real.backbone import assemble
from qmixlora.demo.real.dataset import make_real_dataset
from qmixlora.manifest import MANIFEST
from qmixlora.recipe import Recipe
from qmixlora.training import train
from tests.standin import small_language_model


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


class Runs(NamedTuple):
    """Two runs of the same shapes, by seed: as they ended, and as they were after a kill behind the last checkpoint."""

    finished: tuple[Path, Path]
    killed: tuple[Path, Path]


@pytest.fixture(scope="session")
def two_runs(make_recipe_in: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Nobody writes into them."""
    killed, finished = [], []
    for seed in (0, 1):
        recipe = make_recipe_in(tmp_path_factory.mktemp("damage"), train={"save_every": 2, "seed": seed})
        folder = train(recipe, console=Console(quiet=True))
        finished.append(Path(shutil.copytree(folder, folder.parent / "finished")))
        shutil.rmtree(folder / "adapter")
        (folder / MANIFEST).unlink()
        killed.append(folder)
    return Runs((finished[0], finished[1]), (killed[0], killed[1]))


@pytest.fixture
def killed(two_runs: Runs) -> Iterator[Path]:
    """The killed run in its own place, whole again after the test."""
    folder = two_runs.killed[0]
    kept = folder.parent / "kept"
    shutil.copytree(folder, kept)
    yield folder
    shutil.rmtree(folder)
    kept.rename(folder)


@pytest.fixture
def finished(two_runs: Runs, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_runs.finished[0], tmp_path / "finished"))


class RealStandIn(NamedTuple):
    """A stand-in for the real backbone, whose tokens are single letters, and a few samples of each task."""

    model: Path
    data: Path

    @property
    def overrides(self) -> tuple[str, ...]:
        """Of the recipe real-cpu, for the stand-in; the data apart."""
        return f"model.id={self.model}", "data.max_length=1024", "train.max_new_tokens=2"


@pytest.fixture(scope="session")
def real_standin(tmp_path_factory: pytest.TempPathFactory) -> RealStandIn:
    folder = tmp_path_factory.mktemp("real")
    model, processor = assemble(*small_language_model(), seed=0)
    save_backbone(model, processor, folder / "model")
    data = make_real_dataset(folder / "data", splits={"train": 2, "validation": 1, "test": 1})
    return RealStandIn(folder / "model", data)
