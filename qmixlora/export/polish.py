"""Polishing: a few more steps of a static adapter on its own tasks, which make up for the routing that it lacks."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from datasets import Dataset
from rich.console import Console

from qmixlora.recipe import Edit
from qmixlora.session import TunedSession
from qmixlora.training.callbacks import ProgressDisplay
from qmixlora.training.trainer import make_trainer

from .measurement import Measurement
from .static import StaticAdapter, put

START = 0.3  # of a mixture's mean update; from all of it, some tasks take far more steps (docs/export.md)
SCORE_KEPT, LOSS_ADDED = 0.98, 0.05  # relative to the live model: with less, or more, a mean has lost something


def has_lost(mean: Measurement, live: Measurement) -> bool:
    """Whether a mean is worse than the live model on the same rows, by its score or by its loss."""
    return mean.score < SCORE_KEPT * live.score or mean.loss > (1 + LOSS_ADDED) * live.loss


def is_better(one: Measurement, other: Measurement) -> bool:
    """Whether one adapter is better than another on the same rows: by its score, then by its loss."""
    return (one.score, -one.loss) > (other.score, -other.loss)


def polish(
    session: TunedSession,
    adapter: StaticAdapter,
    rows: Dataset,
    steps: int,
    console: Console,
    *,
    start: float = START,
) -> None:
    """Train the LoRA of a session `steps` optimiser steps on the rows, from the share `start` of the adapter on.

    Batch, accumulation, optimiser and clipping are the run's, as is the peak learning rate, which falls to zero in a
    straight line. The backbone is the NF4 one that the run was trained on; trained modules stay as they are.
    """
    changes = {
        "max_steps": steps,
        "schedule": "linear",
        "warmup_ratio": 0.0,
        "eval_every": None,
        "save_every": None,
        "log_every": max(1, steps // 2),
    }
    recipe = Edit({f"train.{key}": value for key, value in changes.items()}).apply(session.recipe)
    put(session.model, adapter.scaled(start))
    display = ProgressDisplay(console)
    with tempfile.TemporaryDirectory() as scratch:  # its log is of no use to anyone
        try:
            make_trainer(replace(session, recipe=recipe), rows, None, Path(scratch), display).train()
        finally:
            display.close()
