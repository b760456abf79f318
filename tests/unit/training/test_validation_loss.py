"""The validation loss is the mean over supervised tokens, however they lie in batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qmixlora.data import IGNORED
from qmixlora.recipe import Recipe
from qmixlora.session import open_session
from qmixlora.training import make_trainer
from qmixlora.training.callbacks import ProgressDisplay
from qmixlora.training.validation_loss import ValidationLoss

from .helpers import QUIET, rows_of


def labels(*supervised: int) -> torch.Tensor:
    """Labels of samples with so many supervised tokens each."""
    return torch.tensor([[IGNORED] + [1] * count + [IGNORED] * (9 - count) for count in supervised])


def test_tokens_count_and_not_batches() -> None:
    loss = ValidationLoss()
    loss.add(torch.tensor(1.0), labels(1))
    loss.add(torch.tensor(4.0), labels(2, 3))
    assert loss.mean() == pytest.approx((1 * 1.0 + 5 * 4.0) / 6)


def test_an_evaluation_gives_one_loss_whatever_its_batches(
    make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path
) -> None:
    rows: Any = rows_of(data, 7)
    for row in rows[::3]:
        row["turns"][-1]["text"] = "red " * 9
    session = open_session(make_recipe(data={"validation": str(data / "validation.json")}), [])
    losses = []
    for size in (1, 4, 7):
        trainer = make_trainer(session, rows, rows, tmp_path, ProgressDisplay(QUIET))
        trainer.args.per_device_eval_batch_size = size
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-4)
