"""A run: a session and its data on transformers' Trainer, from the first step to the saved adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from rich.console import Console
from torch import Tensor
from transformers.trainer_callback import TrainerState

from qmixlora.adapter import check_fit_of_files
from qmixlora.data import DataFacts, splits_of, taught
from qmixlora.errors import UserError
from qmixlora.files import clear_disk_errors, replacing, write_json
from qmixlora.manifest import MANIFEST, seal
from qmixlora.mixlora import is_adapter_parameter
from qmixlora.mixlora.routing_record import FILE
from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession, open_collator, open_session

from .callbacks import ProgressDisplay, RoutingLog
from .checkpoints import STATE, SealedCheckpoints, last_checkpoint
from .features import with_cached_features
from .recovery import During, Moment, OutOfMemoryError, StepStart, keep_last_step, unless_out_of_memory
from .schedule import schedule_problems
from .trainer import SupervisedTrainer, make_trainer

SURVEY = "survey.json"
FULL_DISK = "Free some space and go on with --resume (from the last complete checkpoint)."


def train(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> Path:
    """Train once, in the folder `recipe.train.output`, which is returned.

    The folder gets `recipe.yaml`, `survey.json`, `checkpoints/`, `metrics.jsonl` and, at the end, `adapter/`. With
    `resume` the run goes on from its last complete checkpoint, as if it had never stopped.

    Raises:
        UserError: anything wrong with recipe, data, model or folder; a full disk; or what the first-steps guard finds.
        OutOfMemoryError: memory ran out; the last completed step is kept as a checkpoint.
    """
    return train_from(starting_point(recipe, resume), recipe, console or Console())


def starting_point(recipe: Recipe, resume: bool) -> Path | None:
    """The checkpoint that a run goes on from; None for a new run.

    Raises:
        UserError: there is none to resume from, or a new run would overwrite something.
    """
    folder = Path(recipe.train.output)
    if not resume and folder.exists() and any(folder.iterdir()):
        raise UserError(
            "The run's folder is not empty.",
            where=str(folder),
            fix="Go on with --resume, choose another train.output, or remove the folder.",
        )
    checkpoint = last_checkpoint(folder)
    if resume and checkpoint is None:
        raise UserError(
            "There is no checkpoint to resume from.",
            where=str(folder / "checkpoints"),
            fix="Train into another folder without --resume; set train.save_every to have checkpoints.",
        )
    return checkpoint


def train_from(checkpoint: Path | None, recipe: Recipe, console: Console) -> Path:
    """`train` from a checkpoint of the run's folder, or from the start. Raises as `train`."""
    folder = Path(recipe.train.output)
    learned, facts = _looked_at(recipe)
    rows, validation = learned["train"], learned.get("validation")
    tasks = sorted(set(rows["task"]))
    _check_tasks(recipe, tasks)
    session = unless_out_of_memory(lambda: open_session(recipe, tasks))
    if session is None:
        raise OutOfMemoryError(Moment("loading", checkpoint), folder)
    for problem in [*facts.warnings, *schedule_problems(recipe, len(rows))]:
        console.print(problem, style="yellow", markup=False, highlight=False, soft_wrap=True)
    with clear_disk_errors(folder, FULL_DISK):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)  # of a run that was finished, whose files change from now on
        (folder / "recipe.yaml").write_text(recipe.with_absolute_paths().to_yaml(), encoding="utf-8")
        write_json(folder / SURVEY, facts.to_dict())
        if recipe.train.cache_features:
            session = _without_vision(session, [rows, *([validation] if validation else [])], checkpoint, console)
        _fit(session, rows, validation, tasks, checkpoint, console)
        with replacing(folder / "adapter") as temporary:
            session.model.save_pretrained(str(temporary))
        seal(folder, _finished_files(folder))
    return folder


def _finished_files(folder: Path) -> list[str]:
    """What a run consists of when it is over: its adapter, its recipe and what an export takes its routing from."""
    adapter = [path.relative_to(folder).as_posix() for path in sorted((folder / "adapter").glob("adapter_*"))]
    return [name for name in (*adapter, "recipe.yaml", FILE) if (folder / name).is_file()]


def _looked_at(recipe: Recipe) -> tuple[dict[str, Dataset], DataFacts]:
    """The rows of the splits that a run uses, every one looked at, and what there is to tell of them.

    That is done before the model is loaded, which may take minutes.
    """
    splits = [split for split in splits_of(recipe.data) if split != "test"]
    found = taught(recipe.data, open_collator(recipe), splits)
    return found.rows, found.facts(recipe.train.micro_batch_size)


def _without_vision(
    session: TunedSession, splits: Sequence[Dataset], checkpoint: Path | None, console: Console
) -> TunedSession:
    """The session on cached features. Raises UserError as `with_cached_features`, and OutOfMemoryError."""
    folder = Path(session.recipe.train.output)
    cached = unless_out_of_memory(lambda: with_cached_features(session, splits, folder, console))
    if cached is None:
        raise OutOfMemoryError(Moment("features", checkpoint), folder)
    return cached


def _fit(
    session: TunedSession,
    rows: Dataset,
    validation: Dataset | None,
    tasks: list[str],
    checkpoint: Path | None,
    console: Console,
) -> None:
    """Take all steps that are left. Raises OutOfMemoryError, and errors of callbacks."""
    folder, display = Path(session.recipe.train.output), ProgressDisplay(console)
    try:
        trainer = make_trainer(session, rows, validation, folder, display)
        start = _watch(trainer, session, tasks, folder)
        trainer.args.eval_on_start = trainer.control.should_evaluate = (
            validation is not None and checkpoint is not None and _was_evaluating(checkpoint)
        )
        if checkpoint is not None:
            check_fit_of_files(session.model, checkpoint)
        resumed = None if checkpoint is None else str(checkpoint)  # accelerate and PEFT take a string only
        done = unless_out_of_memory(lambda: trainer.train(resume_from_checkpoint=resumed))
        if done is None:
            keep_last_step(trainer, start, Moment("training", checkpoint).step)
            during: During = "evaluation" if trainer.control.should_evaluate and not start.torn else "training"
            raise OutOfMemoryError(Moment(during, last_checkpoint(folder)), folder)
    finally:
        display.close()


def _watch(trainer: SupervisedTrainer, session: TunedSession, tasks: list[str], folder: Path) -> StepStart:
    """Add the callbacks that count routing, seal checkpoints and remember the start of a step; the last one has to be
    the last, and is returned.
    """
    counted: list[Tensor] = []
    if session.recipe.adapter.method == "mixlora":
        routing = RoutingLog(session.model, tasks, folder)
        counted = [routing.statistics.sum_LTEF, routing.statistics.count_T]
        trainer.add_callback(routing)
    trainer.add_callback(SealedCheckpoints(session.recipe.train.keep_checkpoints))
    kept = [buffer for name, buffer in session.model.named_buffers() if is_adapter_parameter(name)]
    start = StepStart([*counted, *kept])
    trainer.add_callback(start)
    return start


def _check_tasks(recipe: Recipe, tasks: list[str]) -> None:
    if recipe.adapter.route_on == "task" and len(tasks) < 2:
        raise UserError(
            f"adapter.route_on is 'task', but the data has one task only ({tasks[0]}).",
            where="data.train",
            fix="Give samples a task (data.task_field), or route on the instruction.",
        )


def _was_evaluating(checkpoint: Path) -> bool:
    """Whether memory ran out in the evaluation that was due at this step (ordinary checkpoints come after it)."""
    control = TrainerState.load_from_json(str(checkpoint / STATE)).stateful_callbacks.get("TrainerControl", {})
    assert isinstance(control, dict), "a run has one control"
    return bool(control.get("args", {}).get("should_evaluate", False))
