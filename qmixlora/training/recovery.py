"""Recover from out-of-memory: free the failed step, save a checkpoint of the last completed one."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from qmixlora import processes
from qmixlora.errors import UserError, typed

from .checkpoints import checkpoint_at, damage, step_of

PARTS = {  # of a run
    "loading": "loading the model",
    "features": "computing the features of images",
    "training": "training",
    "evaluation": "evaluating",
}
During = Literal["loading", "features", "training", "evaluation"]


@dataclass(frozen=True)
class Moment:
    """The part of a run in which memory ran out, and the checkpoint of its last completed `step` (none: before any)."""

    during: During
    checkpoint: Path | None

    @property
    def step(self) -> int:
        return step_of(self.checkpoint) if self.checkpoint else 0

    def __str__(self) -> str:
        """Say it in one sentence."""
        kept = f"the last completed step is {self.step}" if self.checkpoint else "before any step could be kept"
        return f"Memory ran out while {PARTS[self.during]}; {kept}."


class OutOfMemoryError(UserError):
    """Memory ran out in a run; `moment` says where it can go on."""

    def __init__(self, moment: Moment, folder: Path) -> None:
        self.moment = moment
        super().__init__(
            str(moment),
            where=str(folder),
            fix="`qmixlora plan` says what takes less memory; a smaller train.micro_batch_size with as much more "
            "train.gradient_accumulation learns the same.",
        )


class StepStart(TrainerCallback):
    """A copy, in host memory, of the state that a step changes before its optimiser runs, from its beginning: the
    random number generators, and `tensors` that forward passes add to (running means, counts; in fp32 or fp64).

    Of `by_task`, each with its dimension of tasks, only the tasks of the step are copied, which `announce` tells.
    It has to be the last of a Trainer's callbacks: a step is completed when all others are done with it.
    """

    def __init__(
        self, tensors: Sequence[Tensor], by_task: Sequence[tuple[Tensor, int]] = (), tasks: Sequence[str] = ()
    ) -> None:
        self.tensors, self.by_task = list(tensors), list(by_task)
        self.ids = {task: index for index, task in enumerate(tasks)}
        self.step_tasks: list[int] = []
        self.kept: Tensor | None = None  # the numbers of all of them, one after the other
        self.random: dict[str, Any] = {}
        self.begun = self.begins_epoch = False
        self.torn = False  # the optimiser has begun to write: parameters and moments are of no step

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # the first step of an epoch begins before its data loader draws a seed: there a resumed run takes up
        self.begins_epoch = float(state.epoch or 0).is_integer()
        self._keep_random()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.begins_epoch:
            self._keep_random()
        self.begins_epoch = False
        parts = [tensor.detach().flatten().double() for tensor in self._changing()]
        # together: the host waits for the device once, and not for each of hundreds of centres
        self.kept = torch.cat(parts).cpu() if parts else None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.torn = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = self.torn = False
        self.kept = None

    def announce(self, tasks: Iterable[str]) -> None:
        """Say which tasks the next step has samples of. Those that nothing is kept of are passed over: a conversation
        may show an answer of a task that the run does not learn.
        """
        self.step_tasks = sorted({self.ids[task] for task in tasks if task in self.ids}) if self.by_task else []

    def rewind(self) -> bool:
        """Undo the changes of a step that was begun; return false if it was too late for that."""
        if self.begun and not self.torn:
            self.restore()
            random.setstate(self.random["python"])
            np.random.set_state(self.random["numpy"])
            torch.random.set_rng_state(self.random["cpu"])
            if torch.cuda.is_available():
                torch.cuda.random.set_rng_state(self.random["cuda"])
        return not self.torn

    def restore(self) -> None:
        """Undo what the forward passes of a step have added to the tensors."""
        if self.kept is None:
            return
        with torch.no_grad():
            now = self._changing()
            parts = [
                part.view_as(own) for part, own in zip(self.kept.split([t.numel() for t in now]), now, strict=True)
            ]
            for tensor, part in zip(self.tensors, parts, strict=False):
                tensor.copy_(part)
            for (tensor, dim), part in zip(self.by_task, parts[len(self.tensors) :], strict=True):
                tensor.index_copy_(dim, self._rows(tensor), part.to(tensor))

    def _changing(self) -> list[Tensor]:
        """The tensors, and of those by task the rows of the step."""
        return [*self.tensors, *(tensor.index_select(dim, self._rows(tensor)) for tensor, dim in self.by_task)]

    def _rows(self, tensor: Tensor) -> Tensor:
        return torch.tensor(self.step_tasks, dtype=torch.long).to(tensor.device, non_blocking=True)

    def _keep_random(self) -> None:
        self.random = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
        if torch.cuda.is_available():
            self.random["cuda"] = torch.cuda.random.get_rng_state()
        self.begun = True


def how_to_go_on(folder: Path, step: int, steps: int) -> str:
    """What is said of a run of so many steps that an error has ended, and whose last checkpoint is of a step."""
    again = typed("train", folder, "--resume")
    return (
        f"Step {step} of {steps} is kept. Go on with: {again}\n"
        "That takes the same training rows. To go on without one of them, end this run where it is "
        f"({again} train.max_steps={step}), and begin another on the others with what it learned: --init-from {folder}"
    )


def keep_last_step(trainer: Trainer, start: StepStart, first_step: int, *, anew: bool = False) -> bool:
    """Have a checkpoint of the last completed step, by the Trainer's own path; return whether there is one.

    None is written where there is nothing newer than `first_step`, which the run started from, or where the optimiser
    was interrupted while it wrote. One that is there stays, unless it is to be written `anew`, since its own writing
    may have been what failed.
    """
    model, output = trainer.model, trainer.args.output_dir
    assert model is not None and output is not None, "a run has both"
    model.zero_grad(set_to_none=True)
    step = trainer.state.global_step
    if step <= first_step or not start.rewind():
        return first_step > 0
    folder = checkpoint_at(output, step)

    def to_be_written() -> bool:
        if not anew and damage(folder) is None:
            return False
        shutil.rmtree(folder, ignore_errors=True)
        return True

    if processes.from_main(to_be_written):
        trainer._save_checkpoint(model, trial=None)
        trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
    return True
