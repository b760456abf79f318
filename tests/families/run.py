"""A run of a variant, to be served: two tasks, images held to four tokens, a projector that was trained hard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from qmixlora.recipe import Recipe
from qmixlora.training import train

from .checkpoint import make_checkpoint, make_data
from .variant import Variant


def train_variant(variant: Variant, folder: Path, console: Console, **settings: Any) -> Path:
    """Train a few steps in a folder, on a random model of the variant; `settings` are more of the recipe's `train`."""
    (folder / "model").mkdir(parents=True)
    values = {
        "model": {"id": str(make_checkpoint(variant, folder / "model")), "dtype": "float32"},
        "adapter": {"num_factors": 4, "r": 2, "alpha": 4, "dropout": 0.0},
        "data": {"train": str(make_data(folder)), "max_length": 1500, "max_image_tokens": 4},
        "train": {
            "output": str(folder / "run"), "max_steps": 6, "micro_batch_size": 2, "gradient_accumulation": 1,
            "learning_rate": 5e-2, "save_every": None, **settings,
        },
        "export": {"polish": 0, "samples": 2},
    }  # fmt: skip
    return train(Recipe.model_validate(values), console=console)
