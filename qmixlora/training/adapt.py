"""The ladder that a run climbs down when memory runs out: a lever is pulled, and it goes on from its last good step.

First the micro-batch is made smaller and accumulated more often, which changes neither what a step sees nor in which
order; then the planner's edits follow, those alone that change nothing of what is learned.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils.memory import clear_device_cache
from rich.console import Console

from qmixlora.errors import UserError
from qmixlora.memory.advice import plan_with_advice
from qmixlora.recipe import Recipe, edited

from .callbacks import memory_gib
from .recovery import Moment, OutOfMemoryError
from .run import run, starting_point

WEIGHTS = {"model.offload_embeddings", "model.stream_layers"}
FORWARD = {*WEIGHTS, "train.loss_chunk"}
STEP = {*FORWARD, *(f"train.checkpointing.{key}" for key in ("enabled", "every_n_layers", "offload"))}
# what helps where, without a change of what is learned, of the optimiser's state, or of what is trained
ALLOWED = {"loading": WEIGHTS, "features": WEIGHTS, "evaluation": FORWARD, "training": STEP}
MOST_STREAMED = 64


def train_within_memory(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> Path:
    """`training.train`, and where memory runs out the recipe's memory levers, one after another.

    Each attempt goes on from the last good step with the same effective batch, data order and schedule. What was
    changed is printed at once and at the end, stands in the run's `recipe.yaml`, and is a record in `metrics.jsonl`:
    `{"step", "out_of_memory": the part of the run, "changed": {path: value}, "memory_gib"}`.

    Raises:
        UserError: as `train`; or memory ran out and `train.on_oom` is stop, or no lever is left.
    """
    console = console or Console()
    checkpoint, tried, changed = starting_point(recipe, resume), [recipe], dict[str, Any]()
    while isinstance(ended := _attempt(recipe, checkpoint, console), Moment):
        edit = next((edit for edit in _levers(recipe, ended) if _edited(recipe, edit) not in [None, *tried]), None)
        if edit is None or recipe.train.on_oom == "stop":
            raise UserError(str(ended), where=recipe.train.output, fix=_advice(recipe, ended, edit, changed))
        recipe, checkpoint = edited(recipe, edit.split()), ended.checkpoint
        tried.append(recipe)
        changed |= _values(edit)
        goes_on = f"Going on from step {ended.step}" if checkpoint else "Starting again"
        console.print(f"{ended} {goes_on} with [bold]{edit}[/bold].", highlight=False, soft_wrap=True)
        _record(Path(recipe.train.output), ended, edit)
    if changed:
        console.print(f"Memory ran out on the way. {_to_write_down(changed)}", highlight=False, soft_wrap=True)
    return ended


def _attempt(recipe: Recipe, checkpoint: Path | None, console: Console) -> Path | Moment:
    """The folder of the finished run, or where memory ran out; then nothing is left of the attempt."""
    try:
        return run(recipe, checkpoint, console)
    except OutOfMemoryError as error:
        moment = error.moment  # the exception's frames hold the model: it must end here
    clear_device_cache(garbage_collection=True)
    return moment


def _levers(recipe: Recipe, moment: Moment) -> Iterator[str]:
    """Edits to try, as overrides: the batch first, then what the planner orders."""
    spec = recipe.train
    if moment.during == "training" and spec.micro_batch_size > 1:
        size = next(n for n in range(spec.micro_batch_size // 2, 0, -1) if spec.micro_batch_size % n == 0)
        times = spec.micro_batch_size // size
        yield f"train.micro_batch_size={size} train.gradient_accumulation={times * spec.gradient_accumulation}"
    if moment.during in {"evaluation", "features"} and spec.eval_batch_size > 1:
        yield f"train.eval_batch_size={spec.eval_batch_size // 2}"
    planned = _planned(recipe)
    for edit in _without_a_plan(recipe) if planned is None else planned:
        if set(_values(edit)) <= ALLOWED[moment.during]:
            yield edit


def _planned(recipe: Recipe) -> list[str] | None:
    """The planner's edits, what saves most first; None where it cannot plan the model."""
    try:
        return [str(entry["edit"]) for entry in plan_with_advice(recipe)["advice"]]
    except Exception:  # whatever a model that the planner does not know makes of it must not end the run
        return None


def _without_a_plan(recipe: Recipe) -> Iterator[str]:
    """What costs least time first. Without a card all weights are in host memory anyway."""
    spec = recipe.train
    if not spec.checkpointing.enabled or spec.checkpointing.every_n_layers > 1:
        yield "train.checkpointing.enabled=true train.checkpointing.every_n_layers=1"
    if spec.loss_chunk is None or spec.loss_chunk > 32:
        yield f"train.loss_chunk={32 if spec.loss_chunk else 128}"
    if torch.cuda.is_available():
        yield "model.offload_embeddings=true"
        yield "train.checkpointing.offload=true"
        if recipe.model.stream_layers < MOST_STREAMED:
            yield f"model.stream_layers={max(8, 2 * recipe.model.stream_layers)}"


def _values(edit: str) -> dict[str, Any]:
    """The values of an edit by their paths."""
    pairs = (override.partition("=") for override in edit.split())
    return {path: yaml.safe_load(text) for path, _, text in pairs}


def _sections(values: dict[str, Any]) -> dict[str, Any]:
    """Values by path as the sections of a recipe."""
    sections: dict[str, Any] = {}
    for path, value in values.items():
        *parents, key = path.split(".")
        target = sections
        for parent in parents:
            target = target.setdefault(parent, {})
        target[key] = value
    return sections


def _edited(recipe: Recipe, edit: str) -> Recipe | None:
    """The recipe with an edit put in; None where the two do not go together."""
    try:
        return edited(recipe, edit.split())
    except UserError:
        return None


def _to_write_down(changed: dict[str, Any]) -> str:
    overrides = " ".join(f"{path}={json.dumps(value)}" for path, value in changed.items())
    text = yaml.safe_dump(_sections(changed), sort_keys=False)
    return f"To start like this next time, write into the recipe:\n\n{text}\nor give as overrides: {overrides}"


def _record(folder: Path, moment: Moment, edit: str) -> None:
    """A line in `metrics.jsonl`, which resuming keeps, since it is of the step that the run goes on from."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"step": moment.step, "out_of_memory": moment.during, "changed": _values(edit), "memory_gib": memory_gib()}
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _advice(recipe: Recipe, moment: Moment, edit: str | None, changed: dict[str, Any]) -> str:
    """What the user can do where the ladder ends."""
    again = "Go on with --resume and" if moment.checkpoint else "Remove the folder and train again with"
    if edit is not None:
        return f"{again} {edit} (train.on_oom: adapt does this by itself)."
    tried = " ".join(f"{path}={json.dumps(value)}" for path, value in changed.items()) or "nothing could be changed"
    others: Sequence[str] = [other for other in _planned(recipe) or [] if not set(_values(other)) <= STEP]
    learns = ", ".join(others) or "a shorter data.max_length, smaller pictures, fewer factors, a smaller model"
    return f"Tried: {tried}. What else would help changes what is trained, in a new run: {learns}."
