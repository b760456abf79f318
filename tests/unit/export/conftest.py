"""A small trained run to export from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qmixlora.recipe import Recipe
from qmixlora.training import train

from .helpers import QUIET


@pytest.fixture(scope="session")
def train_once(backbone: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train a few steps on the random backbone, large enough that a run's mixture is far from its mean.

    A run of the same adapter is trained once; nobody writes into its folder.
    """
    trained: dict[str, Path] = {}

    def make(**adapter: Any) -> Path:
        name = repr(sorted(adapter.items()))
        if name not in trained:
            values = {
                "model": {"id": str(backbone), "dtype": "float32"},
                "adapter": {"num_factors": 4, "r": 2, "alpha": 4, "dropout": 0.0, **adapter},
                "data": {"train": str(data / "train.json"), "test": str(data / "test.json"), "max_length": 128},
                "train": {
                    "output": str(tmp_path_factory.mktemp("runs") / "run"),
                    "max_steps": 12,
                    "micro_batch_size": 20,
                    "gradient_accumulation": 1,
                    "learning_rate": 3e-2,
                    "max_new_tokens": 4,
                },
                "export": {"polish": 0},
            }
            trained[name] = train(Recipe.model_validate(values), console=QUIET)
        return trained[name]

    return make


@pytest.fixture
def make_run(train_once: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A trained run of one's own, by what its adapter has other than the rest."""

    def make(**adapter: Any) -> Path:
        return Path(shutil.copytree(train_once(**adapter), tmp_path / "run"))

    return make


@pytest.fixture
def run(make_run: Callable[..., Path]) -> Path:
    return make_run()
