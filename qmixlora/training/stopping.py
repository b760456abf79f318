"""Stopping a run between steps: asked by a signal, or when its time is over."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from qmixlora import processes
from qmixlora.errors import UserError, typed
from qmixlora.interrupts import Interrupted, Requests


class StopAskedError(Exception):
    """Raised inside a Trainer where the run can stop: a step is completed, and nothing of the next is begun."""


class TimeIsUpError(UserError):
    """`train.max_minutes` are over: as it was asked for, so that the command line exits with 0."""

    exit_code = 0


class Stop(Requests, TrainerCallback):
    """Asks a run to stop, from now on. As a Trainer's callback it also stops an evaluation between two batches."""

    def __init__(self, max_minutes: float | None) -> None:
        super().__init__()
        self.max_minutes = max_minutes
        self.end = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.has_stepped = False  # a start that only loads would never come to an end, however often it is made

    def check(self) -> None:
        """Raise StopAskedError if the run is to stop, in all its processes: a signal may have come to one of them."""
        is_over = self.end is not None and self.has_stepped and time.monotonic() >= self.end
        number, is_over_anywhere = processes.largest([self.number or 0, is_over])
        if number or is_over_anywhere:
            self.number = int(number) or None
            raise StopAskedError

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.has_stepped = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.check()

    def ended(self, folder: Path, step: int, steps: int, kept: bool) -> Interrupted | UserError:
        """The end of a run after so many of its steps, as it is raised; `kept`: there is a checkpoint to go on from."""
        again = f"Go on with: {typed('train', folder, '--resume')}"
        if not kept:
            again = "No step was completed: remove the folder and train again."
        if self.number is not None:
            return Interrupted(self.number, f"{step} of {steps} steps are done, in {folder}. {again}")
        return TimeIsUpError(
            f"Stopped after {self.max_minutes:g} minutes (train.max_minutes): {step} of {steps} steps are done.",
            where=str(folder),
            fix=again,
        )
