"""Finite numbers: a step whose loss, gradient or parameters are not is never kept, and says which samples it had."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback

from qmixlora import processes
from qmixlora.data import Conversation, sample_name
from qmixlora.errors import UserError
from qmixlora.files import append_to_log
from qmixlora.recipe import Recipe

from .data_parallel import idle_batch

SAMPLES = "samples"  # the key of a batch with the names of its samples
LISTED = 8
SKIPPED_IN_A_ROW = 3  # steps after which there is nothing left to hope for


class NotFiniteError(UserError):
    """A step gave numbers that are not finite; the parameters are still those of the step before, if `recoverable`."""

    def __init__(self, what: str, samples: Sequence[str], recipe: Recipe, *, recoverable: bool) -> None:
        self.recoverable = recoverable
        more = [f"and {len(samples) - LISTED} more"] if len(samples) > LISTED else []
        look = "Look at these samples, lower" if samples else "Lower"
        skip = ", with train.on_nan=skip past single steps of this kind" if recoverable else ""
        super().__init__(
            f"{what} (model.dtype: {recipe.model.dtype}). The run stops; "
            + ("no checkpoint is lost." if recoverable else "of a step that is taken nothing can be skipped."),
            where="\n         ".join([recipe.train.output, *samples[:LISTED], *more]),
            fix=f"{look} train.learning_rate, or take bfloat16 for float16, in a new run. "
            f"--resume goes on from the last checkpoint, if there is one{skip}.",
        )


@dataclass
class NumberedRows:
    """Rows as a data set whose samples know where they come from, or their number, which errors name them by."""

    rows: Sequence[Conversation]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"origin": f"sample {index}", **self.rows[index]}


@dataclass
class NamingCollator:
    """A collator whose batches have the names of their samples."""

    collator: Callable[[Sequence[Conversation]], dict[str, Any]]

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        if not rows:
            return idle_batch()
        return {**self.collator(rows), SAMPLES: [_name(row) for row in rows]}


def _name(row: Mapping[str, Any]) -> str:
    files = ", ".join(image["path"] or "an image in the data" for image in row["images"])
    return f"{sample_name(row)} with {files}" if files else sample_name(row)


class FiniteSteps:
    """Judges every optimiser step by its loss and the norm of its gradient, which the host waits for once a step.

    What it says of a loss is a mean over the steps that were taken: those that were skipped have none.
    """

    def __init__(self, recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
        self.recipe, self.log, self.say = recipe, folder / "metrics.jsonl", say
        self.batches: list[tuple[Tensor, list[str]]] = []  # of the step at hand: loss, names of samples
        self.taken: list[float] = []  # the loss of every step since the last log
        self.total, self.steps = 0.0, 0
        self.skipped = self.in_a_row = 0

    def add(self, loss: Tensor, samples: Sequence[str]) -> None:
        """Note a micro-batch of the step at hand; its loss counts as a share of the step's."""
        self.batches.append((loss, list(samples)))

    def may_be_taken(self, step: int, norm: Tensor) -> bool:
        """Whether the step's numbers are finite; false for one that is to be skipped.

        Raises:
            NotFiniteError: they are not, and `train.on_nan` is stop, or it is the third step in a row.
        """
        batches, self.batches = self.batches, []
        losses = [loss for loss, _ in batches]
        *read, size = torch.stack([*losses, norm.to(losses[0].device)]).tolist() if losses else [float(norm)]
        total = processes.total(sum(read))
        if all(map(math.isfinite, (total, size))):
            self.taken.append(total)
            self.in_a_row = 0
            return True
        named = processes.gathered(list(zip(read, (names for _, names in batches), strict=True)))
        bad = [names for loss, names in named if not math.isfinite(loss)]
        loss = next((loss for loss, _ in named if not math.isfinite(loss)), None)
        number, value = ("loss", loss) if loss is not None else ("gradient norm", size)
        what = f"The {number} of step {step} is {value}"
        samples = [name for names in bad or [names for _, names in named] for name in names]
        self.skipped += 1
        self.in_a_row += 1
        if self.recipe.train.on_nan == "stop":
            raise NotFiniteError(what, samples, self.recipe, recoverable=True)
        if self.in_a_row == SKIPPED_IN_A_ROW:
            raise NotFiniteError(f"{what}, the third step in a row", samples, self.recipe, recoverable=True)
        self.say(f"{what}: the step is skipped ({self.skipped} so far; {'; '.join(samples[:LISTED])})")
        if processes.is_main():
            append_to_log(self.log, {"step": step, "skipped": what, SAMPLES: samples})
        return False

    def in_logs(self, logs: dict[str, Any]) -> dict[str, Any]:
        """Trainer's numbers as they are logged: losses as means over steps taken, None for what is not finite."""
        if "loss" in logs:
            self.total, self.steps = self.total + sum(self.taken), self.steps + len(self.taken)
            logs = {**logs, "loss": sum(self.taken) / len(self.taken) if self.taken else None}
            self.taken = []
        if "train_loss" in logs:
            steps = self.steps + len(self.taken)
            logs = {**logs, "train_loss": (self.total + sum(self.taken)) / steps if steps else None}
        return {name: value if _is_finite(value) else None for name, value in logs.items()}


class FiniteParameters(TrainerCallback):
    """Stops a run whose optimiser made a parameter that is not finite, before anything is saved."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trained = [(name, p) for name, p in kwargs["model"].named_parameters() if p.requires_grad]
        with torch.no_grad():
            if bool(get_total_norm([parameter for _, parameter in trained]).isfinite()):
                return
            names = [name for name, parameter in trained if not parameter.norm().isfinite()]
        where = f", such as {names[0]}" if names else ""
        what = f"After step {state.global_step} {len(names)} of the trained tensors are not finite{where}"
        raise NotFiniteError(what, [], self.recipe, recoverable=False)


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
