"""A few more steps of a static adapter on its own tasks: what the mixture did by routing is learned without it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from qmixlora.session import Session
from qmixlora.training.callbacks import ProgressDisplay
from qmixlora.training.run import make_trainer

from .static import StaticAdapter, put

START = 0.3  # of a mixture's mean update; from all of it, some tasks take far more steps (docs/export.md)


def polish(
    session: Session, adapter: StaticAdapter, rows: Any, steps: int, console: Console, *, start: float = START
) -> None:
    """Train the LoRA of a session `steps` optimiser steps on the rows, from the share `start` of the adapter on.

    Batch, accumulation, optimiser and clipping are the run's, as is the peak learning rate, which falls to zero in a
    straight line. The backbone is the NF4 one that the run was trained on; trained modules stay as they are.
    """
    changes: dict[str, Any] = {
        "max_steps": steps,
        "schedule": "linear",
        "warmup_ratio": 0.0,
        "eval_every": None,
        "save_every": None,
        "log_every": max(1, steps // 2),
    }
    recipe = session.recipe.model_copy(update={"train": session.recipe.train.model_copy(update=changes)})
    put(session.model, adapter.scaled(start))
    display = ProgressDisplay(console)
    with tempfile.TemporaryDirectory() as scratch:  # its log is of no use to anyone
        changed = Session(recipe, session.model, session.processor, session.anatomy, session.collator)
        try:
            make_trainer(changed, rows, None, Path(scratch), display).train()
        finally:
            display.close()
