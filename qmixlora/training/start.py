"""The start of a run: its folder owned, and where it begins; what several processes cannot do is refused here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.trainer_callback import TrainerState

from qmixlora import processes
from qmixlora.adapter import ADAPTER_WEIGHTS
from qmixlora.backbone.levers import has_levers
from qmixlora.errors import UserError
from qmixlora.recipe import Recipe

from .checkpoints import STATE, last_checkpoint
from .history import HISTORY, Change, Event, History, check_changes
from .owner import is_empty, owned
from .stopping import Stop

MORE_STEPS = ("train.epochs", "train.max_steps")


@dataclass(frozen=True)
class Start:
    """Where a run begins and what may end it: the checkpoint that it goes on from (None: its first step), the run whose
    adapter a new one begins with, what this start changes of the recipe, and the stop that can be asked for.
    """

    checkpoint: Path | None
    init_from: Path | None
    event: Event
    changed: Mapping[str, Any]
    stop: Stop


@contextmanager
def started(recipe: Recipe, resume: bool, init_from: Path | None, console: Console) -> Iterator[Start | None]:
    """Own the run's folder in a block, and say where the run begins; None for a run that is finished.

    Raises:
        UserError: there is nothing to resume from, a new run would overwrite something, the recipe changes what a run
            cannot change, or another process has the folder.
    """
    processes.join()
    check_together(recipe)
    folder = Path(recipe.train.output)
    with ExitStack() as stack:

        def begin() -> tuple[Path | None, dict[str, list[Any]]] | None:
            stack.enter_context(owned(folder))
            return _begun(recipe, resume, console)

        begun = processes.from_main(begin)  # who has the folder is the main process' affair
        if begun is None:
            yield None
            return
        checkpoint, changed = begun
        stop = Stop(recipe.train.max_minutes)
        yield Start(checkpoint, init_from, "resumed" if resume else "started", changed, stop)


def _begun(recipe: Recipe, resume: bool, console: Console) -> tuple[Path | None, dict[str, list[Any]]] | None:
    """The checkpoint that a start goes on from, and what it changes of the recipe; None for a run that is finished.

    Raises UserError as `started`.
    """
    folder = Path(recipe.train.output)
    checkpoint = starting_point(recipe, resume)
    changes = check_changes(folder, recipe, processes.count()) if resume else []
    if resume and is_finished(folder, checkpoint, changes):
        told = f"Nothing is left to do: {folder} is finished."
        if early := History(folder).stopped_early():
            told += f" It stopped early, at step {early[0]} of {early[1]}; to go on: train.early_stopping=null."
        console.print(told, markup=False, highlight=False, soft_wrap=True)
        return None
    if resume and checkpoint is None:
        raise UserError(
            "There is no checkpoint to resume from.",
            where=str(folder / "checkpoints"),
            fix="Train without --resume."
            if is_empty(folder)
            else "Remove the folder and train without --resume; set train.save_every to have checkpoints.",
        )
    differs = [str(change) for change in changes] + (History(folder).other_libraries() if resume else [])
    for difference in differs:
        console.print(f"Differs from the run so far: {difference}", highlight=False, soft_wrap=True, markup=False)
    return checkpoint, {change.path: [change.own, change.new] for change in changes}


def starting_point(recipe: Recipe, resume: bool) -> Path | None:
    """The newest checkpoint in a run's folder. Raises UserError if a new run would overwrite something."""
    folder = Path(recipe.train.output)
    if not resume and not is_empty(folder):
        raise UserError(
            "The run's folder is not empty.",
            where=str(folder),
            fix="Go on with --resume, choose another train.output, or remove the folder.",
        )
    return last_checkpoint(folder)


def is_finished(folder: Path, last: Path | None, changes: Sequence[Change]) -> bool:
    """Whether a run has taken all its steps, or as many as `train.early_stopping` let it, and none are added."""
    more = (*MORE_STEPS, "train.early_stopping") if History(folder).stopped_early() else MORE_STEPS
    if not (folder / "adapter" / ADAPTER_WEIGHTS).is_file() or not {c.path for c in changes}.isdisjoint(more):
        return False
    if (folder / HISTORY).is_file():
        return History(folder).finished()
    if last is None:
        return True
    state = TrainerState.load_from_json(str(last / STATE))  # a run of an earlier release
    return bool(state.global_step >= state.max_steps)


def check_together(recipe: Recipe) -> None:
    """Raise UserError, by name, for what several processes cannot do."""
    if others := sorted(processes.asked_for() - {"FSDP"}):
        raise UserError(
            f"qmixlora trains with accelerate alone or with FSDP, not with {others[0]}.",
            where="the configuration of accelerate",
            fix="Run `accelerate config` again, or name another with `accelerate launch --config_file`.",
        )
    if not processes.are_several():
        return
    if processes.are_sharded():
        _check_sharded(recipe)
    if recipe.adapter.task_mix:
        raise UserError(
            "The running means of tasks move within a step, and several processes would each have their own.",
            where=f"adapter.task_mix: {recipe.adapter.task_mix:g}, {processes.count()} processes",
            fix="Set adapter.task_mix=0, or train in one process.",
        )


def _check_sharded(recipe: Recipe) -> None:
    if os.environ.get("FSDP_VERSION") != "2":
        raise UserError(
            "Weights are sharded with FSDP2, and accelerate was asked for FSDP1.",
            where=f"fsdp_version: {os.environ.get('FSDP_VERSION', '1')}",
            fix="Set fsdp_version: 2 (`accelerate launch --use_fsdp --fsdp_version 2`).",
        )
    if has_levers(recipe.model):
        raise UserError(
            "Memory levers of the model place weights in another way than FSDP does.",
            where="model: offload_embeddings, stream_layers, quantize_lm_head, quantize_embeddings, quantize_vision",
            fix="Leave them out, or train without FSDP.",
        )
