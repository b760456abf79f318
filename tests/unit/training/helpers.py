"""Rows, adapters that are away from zero, and gradients."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from qmixlora.data import load_conversations
from qmixlora.loss import supervised_loss
from qmixlora.session import Session
from qmixlora.training import SupervisedTrainer
from tests.adapters import randomize

QUIET = Console(file=io.StringIO())


def rows_of(data: Path, count: int) -> list[dict[str, Any]]:
    conversations = load_conversations(str(data / "train.json"))
    return [conversations[i] for i in range(count)]


def warm(session: Session) -> None:
    """Away from B = 0, so that every tensor has a gradient."""
    randomize(session.model, "lora_B", std=0.05, seed=2)


def gradients(session: Session, batch: dict[str, Any], chunk: int | None = None) -> dict[str, Tensor]:
    session.model.zero_grad()
    supervised_loss(session.model, batch, chunk=chunk).backward()
    return {n: p.grad.clone() for n, p in session.model.named_parameters() if p.requires_grad and p.grad is not None}


def descend_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs step along their gradients. Adam makes a whole step of a gradient that is nothing but rounding, which is
    another one on every processor.
    """

    def create_optimizer(trainer: SupervisedTrainer, *args: Any) -> torch.optim.Optimizer:
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        trainer.optimizer = torch.optim.SGD(trained, lr=trainer.args.learning_rate)
        return trainer.optimizer

    monkeypatch.setattr(SupervisedTrainer, "create_optimizer", create_optimizer)


def images_of_their_own(data: Path, count: int) -> Any:
    """Samples with an image each of its own."""
    rows = load_conversations(str(data / "train.json"))
    first = {row["images"][0]["path"]: index for index, row in reversed(list(enumerate(rows)))}
    return rows.select(sorted(first.values())[:count])
