"""A run: a session and its data on transformers' Trainer, from the first step to the saved adapter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from torch import Tensor
from transformers.trainer_callback import TrainerState

from qmixlora import processes
from qmixlora.adapter import ADAPTER_WEIGHTS, adapter_problems, check_fit_of_files, load_adapter, read_weights
from qmixlora.data import DataFacts, fingerprint, indices_by_answer, splits_of, taught
from qmixlora.errors import UserError
from qmixlora.files import clear_disk_errors, replacing, write_json
from qmixlora.manifest import MANIFEST, seal
from qmixlora.mixlora import is_adapter_parameter
from qmixlora.mixlora.routing_record import FILE
from qmixlora.out_of_memory import unless_out_of_memory
from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession, open_collator, open_session

from .best import take_best
from .callbacks import ProgressDisplay, RoutingLog
from .checkpoints import STATE, SealedCheckpoints, keep_all, last_checkpoint, step_of
from .earlier import set_aside
from .features import with_cached_features
from .finite import NotFiniteError
from .guard import check_has_images, check_kinds
from .history import History, check_same_adapter, check_same_base
from .look_ahead import check_look_ahead
from .recovery import During, Moment, OutOfMemoryError, StepStart, how_to_go_on, keep_last_step
from .schedule import check_more_steps, schedule_problems
from .start import MORE_STEPS, Start, started
from .stopping import Stop, StopAskedError
from .trackers import check_installed
from .trainer import SupervisedTrainer, make_trainer

TASK_MEANS = "mixlora_task_"  # of the buffers of a MixLoRA layer that have a row for every task
SURVEY = "survey.json"
FULL_DISK = "Free some space and go on with --resume (from the last complete checkpoint)."


def train(
    recipe: Recipe, *, resume: bool = False, init_from: Path | None = None, console: Console | None = None
) -> Path:
    """Train once, in the folder `recipe.train.output`, which is returned.

    The folder gets `recipe.yaml`, `history.jsonl`, `survey.json`, `checkpoints/`, `metrics.jsonl` and, at the end,
    `adapter/`; what was made of an earlier adapter goes into `earlier/`. With `resume` the run goes on from its last
    complete checkpoint, as if it had never stopped; one that is finished stays as it is. `init_from` is the folder of a
    run whose adapter the new one begins with.

    Raises:
        UserError: anything wrong with recipe, data, model or folder; a full disk; or what the first-steps guard finds.
        NotFiniteError: a loss, a gradient or a parameter is not finite.
        OutOfMemoryError: memory ran out; the last completed step is kept as a checkpoint.
        TimeIsUpError, Interrupted: `train.max_minutes` are over, or a signal came; the last completed step is kept.
    """
    console = console or Console()
    with started(recipe, resume, init_from, console) as start:
        return Path(recipe.train.output) if start is None else train_from(start, recipe, console)


def train_from(start: Start, recipe: Recipe, console: Console) -> Path:
    """`train` from a checkpoint of the run's folder, or from the start. Raises as `train`."""
    folder = Path(recipe.train.output)
    check_installed(recipe.train.report_to)
    learned, facts, digests = processes.main_first(lambda: _looked_at(recipe))
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=digests)})
    rows, validation = learned["train"], learned.get("validation")
    tasks = list(indices_by_answer(rows))
    _check_tasks(recipe, tasks)
    check_has_images(recipe, rows)
    batch = facts.samples_of_a_batch
    if not start.changed.keys().isdisjoint(MORE_STEPS):
        check_more_steps(recipe, len(rows), batch)
    session = unless_out_of_memory(lambda: opened(recipe, tasks, start.init_from))
    if session is None:
        raise OutOfMemoryError(Moment("loading", start.checkpoint), folder)
    recipe = session.recipe
    check_same_base(recipe.model, folder)
    of_adapter = adapter_problems(recipe.adapter, session.anatomy)
    for problem in [*facts.warnings, *of_adapter, *schedule_problems(recipe, len(rows), batch)]:
        console.print(problem, style="yellow", markup=False, highlight=False, soft_wrap=True)
    history, digest, step = History(folder), fingerprint(rows), Moment("loading", start.checkpoint).step
    history.check_data(digest)
    origin = {"init_from": str(start.init_from.resolve())} if start.init_from else {}
    facts_of_start = {"data": digest, "processes": processes.count(), **origin}
    with clear_disk_errors(folder, FULL_DISK):
        if processes.is_main():
            (folder / MANIFEST).unlink(missing_ok=True)  # of a run that was finished, whose files change from now on
            history.add(start.event, step, recipe, start.changed, **facts_of_start)
            write_json(folder / SURVEY, facts.to_dict())
        if recipe.train.cache_features:
            splits = [rows, *([validation] if validation else [])]
            with_vision = session
            session = processes.main_first(lambda: _without_vision(with_vision, splits, start.checkpoint, console))
        unless_out_of_memory(lambda: check_look_ahead(session, rows))  # if it runs out, so will the first step
        with start.stop.deferred():
            state = _fit(session, rows, validation, tasks, start, console)
            if processes.is_main():
                _keep(session, state, console)
    return folder


def _keep(session: TunedSession, state: TrainerState, console: Console) -> None:
    """Write what a run that took all its steps has learned: its best step, where it was judged, or its last."""
    folder = Path(session.recipe.train.output)
    best, step = state.best_global_step, take_best(session, state, folder)
    with replacing(folder / "adapter") as temporary:
        session.model.save_pretrained(str(temporary))
        if aside := set_aside(folder, temporary / ADAPTER_WEIGHTS):
            console.print(f"Set aside: {aside}.", markup=False, highlight=False, soft_wrap=True)
    told = f"Kept: the adapter of step {step}, of {state.global_step}."
    if step != best:
        console.print(f"{told} The best was that of step {best}, whose checkpoint is gone.", highlight=False)
    elif step not in (None, state.global_step):
        console.print(told, highlight=False)
    kept = {} if step is None else {"kept_step": step, "kept_for": state.best_metric if step == best else None}
    History(folder).add("finished", state.global_step, session.recipe, {}, steps=state.max_steps, **kept)
    seal(folder, _finished_files(folder))


def _finished_files(folder: Path) -> list[str]:
    """What a run consists of when it is over: its adapter, its recipe and what an export takes its routing from."""
    adapter = [path.relative_to(folder).as_posix() for path in sorted((folder / "adapter").glob("adapter_*"))]
    return [name for name in (*adapter, "recipe.yaml", FILE) if (folder / name).is_file()]


def opened(recipe: Recipe, tasks: list[str], init_from: Path | None) -> TunedSession:
    """A session with a fresh adapter, or with a run's. Raises UserError where that does not fit."""
    if init_from is None:
        return open_session(recipe, tasks)
    check_same_adapter(recipe, tasks, init_from)
    session = open_session(recipe, tasks)
    check_same_base(session.recipe.model, init_from)
    load_adapter(session.model, read_weights(init_from / "adapter"), where=str(init_from / "adapter"))
    return session


def _looked_at(recipe: Recipe) -> tuple[dict[str, Dataset], DataFacts, dict[str, Any]]:
    """The rows of the splits that a run uses, every one looked at, what there is to tell of them, and the digests that
    the recipe's `data` keeps of them.

    That is done before the model is loaded, which may take minutes.
    """
    splits = [split for split in splits_of(recipe.data) if split != "test"]
    data = recipe.data.model_copy(update={"learned": None})  # of the run that it may be the recipe of
    found = taught(data, open_collator(recipe), splits)
    check_kinds(recipe, found.collator, found.rows)
    digests = {"held_out": found.read_in.held_out, "learned": found.read_in.learned}
    return found.rows, found.facts(recipe.train), digests


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
    start: Start,
    console: Console,
) -> TrainerState:
    """Take all steps that are left; returns the state after the last. Whatever ends it before, the last step is kept.

    Raises OutOfMemoryError, NotFiniteError, the end that was asked for, and errors of callbacks.
    """
    folder, display = Path(session.recipe.train.output), ProgressDisplay(console)
    checkpoint, first = start.checkpoint, Moment("training", start.checkpoint).step
    try:
        trainer = make_trainer(session, rows, validation, folder, display)
        begun = _watch(trainer, session, tasks, start.stop, folder)
        trainer.args.eval_on_start = trainer.control.should_evaluate = (
            validation is not None and checkpoint is not None and _was_evaluating(checkpoint)
        )
        if checkpoint is not None:
            check_fit_of_files(session.model, checkpoint)
        resumed = None if checkpoint is None else str(checkpoint)  # accelerate and PEFT take a string only
        try:
            done = unless_out_of_memory(lambda: trainer.train(resume_from_checkpoint=resumed))
        except StopAskedError:
            kept = keep_last_step(trainer, begun, first)
            step, steps = trainer.state.global_step, trainer.state.max_steps
            raise start.stop.ended(folder, step, steps, kept) from None
        except NotFiniteError as error:
            if error.recoverable:
                keep_all(trainer.callback_handler.callbacks)  # who looks for the cause may want an older one
                keep_last_step(trainer, begun, first)
            raise
        except Exception:
            _keep_and_tell(trainer, begun, first, folder)
            raise
        if done is None:
            keep_last_step(trainer, begun, first, anew=True)
            during: During = "evaluation" if trainer.control.should_evaluate and not begun.torn else "training"
            raise OutOfMemoryError(Moment(during, processes.from_main(lambda: last_checkpoint(folder))), folder)
        return trainer.state
    finally:
        display.close()


def _keep_and_tell(trainer: SupervisedTrainer, begun: StepStart, first: int, folder: Path) -> None:
    """Keep the last step of a run that an error ends, whatever it is, and say how to go on; of an error of one of
    several processes the others know nothing, and would not take part.
    """
    if processes.are_several():
        return
    with suppress(Exception):  # what keeps a step from being written is told less than what ended the run
        keep_last_step(trainer, begun, first)
        if (checkpoint := last_checkpoint(folder)) is not None:
            trainer.say(how_to_go_on(folder, step_of(checkpoint), trainer.state.max_steps))


def _watch(trainer: SupervisedTrainer, session: TunedSession, tasks: list[str], stop: Stop, folder: Path) -> StepStart:
    """Add the callbacks that stop, count routing, seal checkpoints and remember the start of a step; the last one has
    to be the last, and is returned.
    """
    trainer.add_callback(stop)
    trainer.stop_if_asked = stop.check
    by_task: list[tuple[Tensor, int]] = []
    if session.recipe.adapter.method == "mixlora":
        routing = RoutingLog(session.model, tasks, folder)
        trainer.also_logged = routing.logs
        by_task = [(routing.statistics.sum_LTEF, 1), (routing.statistics.count_T, 0)]
        trainer.add_callback(routing)
    trainer.add_callback(SealedCheckpoints(session.recipe.train.keep_checkpoints))
    buffers = [(name, buffer) for name, buffer in session.model.named_buffers() if is_adapter_parameter(name)]
    by_task += [(buffer, 0) for name, buffer in buffers if TASK_MEANS in name]
    start = StepStart([buffer for name, buffer in buffers if TASK_MEANS not in name], by_task, tasks)
    trainer.add_callback(start)
    trainer.undo_forward, trainer.announce = start.restore, start.announce
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
