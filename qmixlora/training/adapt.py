"""A run that fits: when memory runs out, apply a lever and go on from the last completed step.

First the micro-batch is made smaller and accumulated more often, which changes neither what a step sees nor in which
order; then the planner's edits follow, only those that change nothing of what is learned.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache
from rich.console import Console
from rich.markup import escape

from qmixlora import processes
from qmixlora.backbone.levers.table import Facts, Lever, lever_edits
from qmixlora.device import peak_memory_gib
from qmixlora.errors import UserError
from qmixlora.files import append_to_log, write_json
from qmixlora.memory import card_at_hand, plan_worst
from qmixlora.memory.advice import plan_with_advice
from qmixlora.memory.architectures import config_of
from qmixlora.recipe import Edit, Recipe

from .history import changes_of
from .recovery import Moment, OutOfMemoryError
from .run import train_from
from .start import Start, started

PLAN = "plan.json"
BATCHES = ("train.micro_batch_size", "train.eval_batch_size")  # levers that come before the planner's


def train_within_memory(
    recipe: Recipe, *, resume: bool = False, init_from: Path | None = None, console: Console | None = None
) -> Path:
    """`train`, and where memory runs out the recipe's memory levers, one after another.

    Each attempt goes on from the last completed step with the same effective batch, data order and schedule. Every
    change is printed at once and at the end, stands in the run's `recipe.yaml`, and is a record in `metrics.jsonl`:
    `{"step", "out_of_memory": the part of the run, "changed": {path: value}, "memory_gib"}`.

    Raises:
        UserError: as `train`; or memory ran out and `train.on_oom` is stop, or no lever is left.
    """
    console = console or Console()
    with started(recipe, resume, init_from, console) as start:
        return Path(recipe.train.output) if start is None else _until_it_fits(start, recipe, console)


def _until_it_fits(start: Start, recipe: Recipe, console: Console) -> Path:
    tried, changes = [recipe], Edit({})
    card = card_at_hand()  # before anything lies on it
    while isinstance(ended := _attempt(start, recipe, console), Moment):
        edit = next((edit for edit in _edits(recipe, ended) if _applied(recipe, edit) not in [None, *tried]), None)
        if edit is None or recipe.train.on_oom == "stop":
            raise UserError(str(ended), where=recipe.train.output, fix=_fix(recipe, ended, edit, changes))
        changed = {change.path: [change.own, change.new] for change in changes_of(recipe, edit.apply(recipe))}
        recipe = edit.apply(recipe)
        start = replace(start, checkpoint=ended.checkpoint, event="adapted", changed=changed)
        tried.append(recipe)
        changes |= edit
        goes_on = f"Going on from step {ended.step}" if ended.checkpoint else "Starting again"
        told = f"{escape(f'{ended} {goes_on} with')} [bold]{escape(str(edit))}[/bold]."
        console.print(told, highlight=False, soft_wrap=True)
        if processes.is_main():
            _record(Path(recipe.train.output), ended, edit)
    if card is not None and processes.is_main():
        _keep_plan(recipe, card)
    if changes.values:
        console.print(
            f"Memory ran out on the way. {_to_write_down(changes)}", markup=False, highlight=False, soft_wrap=True
        )
    return ended


def _keep_plan(recipe: Recipe, card: int) -> None:
    """Write what is planned for a card beside what a run has measured on it, as far as the planner knows the model."""
    with suppress(Exception):  # the run is over: nothing of the planner may end it
        write_json(Path(recipe.train.output) / PLAN, plan_worst(recipe, card).to_dict())


def _attempt(start: Start, recipe: Recipe, console: Console) -> Path | Moment:
    """The folder of the finished run, or where memory ran out; then nothing is left of the attempt."""
    try:
        return train_from(start, recipe, console)
    except OutOfMemoryError as error:
        moment = error.moment  # the exception's frames hold the model: it must end here
    clear_device_cache(garbage_collection=True)
    return moment


def _edits(recipe: Recipe, moment: Moment) -> Iterator[Edit]:
    """Edits to try: the batch first, then in the order of the planner."""
    by_cost = lever_edits(recipe, _facts(recipe), part=moment.during)
    yield from (edit for lever, edit in by_cost if lever.key in BATCHES)
    planned = _planned(recipe)
    if planned is None:
        no_gpu = not torch.cuda.is_available()
        planned = [(lever, edit) for lever, edit in by_cost if not (lever.moves_to_host and no_gpu)]
    yield from (edit for lever, edit in planned if lever.learns_the_same and moment.during in lever.helps)


def _facts(recipe: Recipe) -> Facts:
    """The number of decoder layers, as far as the model's configuration tells it."""
    with suppress(UserError, AttributeError):
        return Facts(layers=int(config_of(recipe.model).get_text_config().num_hidden_layers))
    return Facts()


def _planned(recipe: Recipe) -> list[tuple[Lever, Edit]] | None:
    """The planner's edits, largest saving first; None where it cannot plan the model, which a warning tells unless the
    planner itself has refused it.
    """
    try:
        return [(saving.lever, saving.edit) for saving in plan_with_advice(recipe).savings]
    except UserError:
        return None
    except Exception as error:  # a model that the planner does not know must not end the run
        warnings.warn(f"The memory planner failed ({error!r}); levers follow in the order of their cost.", stacklevel=2)
        return None


def _applied(recipe: Recipe, edit: Edit) -> Recipe | None:
    """The recipe with an edit applied; None where the two do not go together."""
    try:
        return edit.apply(recipe)
    except UserError:
        return None


def _to_write_down(changes: Edit) -> str:
    return f"To start like this next time, write into the recipe:\n\n{changes.yaml()}\nor give as overrides: {changes}"


def _record(folder: Path, moment: Moment, edit: Edit) -> None:
    """Add a line to `metrics.jsonl`, which resuming keeps, since it is of the step that the run goes on from."""
    facts = {"step": moment.step, "out_of_memory": moment.during, "changed": dict(edit.values)}
    append_to_log(folder / "metrics.jsonl", {**facts, "memory_gib": peak_memory_gib()})


def _fix(recipe: Recipe, moment: Moment, edit: Edit | None, changes: Edit) -> str:
    """Tell the user how to go on where no further lever is applied."""
    again = "Go on with --resume and" if moment.checkpoint else "Remove the folder and train again with"
    if edit is not None:
        return f"{again} {edit} (train.on_oom: adapt does this by itself)."
    tried = str(changes) or "nothing could be changed"
    others = ", ".join(str(other) for lever, other in _planned(recipe) or [] if not lever.learns_the_same)
    learns = others or "a shorter data.max_length, smaller images, fewer factors, a smaller model"
    return f"Tried: {tried}. Other edits help too, but change what is trained, in a new run: {learns}."
