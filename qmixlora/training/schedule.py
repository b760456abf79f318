"""Whether a schedule fits the data: a run that logs, evaluates or saves nothing is told before its first step."""

from __future__ import annotations

from pathlib import Path

from qmixlora import processes
from qmixlora.errors import UserError
from qmixlora.recipe import Recipe, steps_of

from .history import History

FEW = 10  # optimiser steps in which nothing is learned
SHORT = 0.1  # the share of a run's steps after which something is logged or saved at the latest, in the advice


def schedule_problems(recipe: Recipe, samples: int, batch: float | None = None) -> list[str]:
    """What will surprise in a run on so many samples, each in one sentence with the values to set; `batch` is how many
    a micro-batch has on average, where it is filled by tokens.
    """
    spec = recipe.train
    steps, together = _steps(recipe, samples, batch)
    effective = round(together * spec.gradient_accumulation)
    often = max(1, int(SHORT * steps))
    problems = []
    if steps < FEW and spec.max_steps is None:
        problems.append(
            f"{samples} samples in steps of {effective} are {steps} optimiser step{'s' if steps > 1 else ''}: "
            f"raise train.epochs, or lower train.gradient_accumulation."
        )
    if spec.log_every > steps:
        problems.append(f"Nothing will be logged in {steps} steps: set train.log_every={often}.")
    if recipe.data.validation and spec.eval_every is not None and spec.eval_every > steps:
        problems.append(f"Nothing will be evaluated before the last of {steps} steps: set train.eval_every={often}.")
    if spec.save_every is not None and spec.save_every > steps and steps >= FEW:
        problems.append(
            f"No checkpoint will be saved in {steps} steps (a run that stops early is lost): set "
            f"train.save_every={max(1, steps // 4)}."
        )
    return problems


def check_more_steps(recipe: Recipe, samples: int, batch: float | None = None) -> None:
    """Raise UserError if a run that is finished is to go on, for no more steps than it has taken; the rest as in
    `schedule_problems`.
    """
    folder = Path(recipe.train.output)
    taken, (steps, _) = History(folder).finished_at(), _steps(recipe, samples, batch)
    if taken is not None and steps <= taken:
        raise UserError(
            f"The run is finished, at step {taken}, and of {steps} steps none are left to take.",
            where=f"{folder}: train.max_steps, train.epochs",
            fix=f"Ask for more than {taken} steps, or leave them as they were. A shorter run is a new one, in another "
            "folder (train.output).",
        )


def _steps(recipe: Recipe, samples: int, batch: float | None) -> tuple[int, float]:
    """The optimiser steps of a run, and the samples that all processes compute at a time."""
    together = (batch or recipe.train.micro_batch_size) * processes.count()
    return steps_of(recipe, samples, together), together
