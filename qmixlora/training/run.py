"""The run: a session and its data on transformers' Trainer, from the first step to the saved adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from qmixlora.data import load_conversations
from qmixlora.errors import UserError
from qmixlora.files import clear_disk_errors, put_in_place
from qmixlora.loss import supervised_loss
from qmixlora.recipe import Data, Recipe
from qmixlora.session import Session, open_session

from .callbacks import FirstStepsGuard, MetricsLog, ProgressDisplay, RoutingLog
from .features import with_cached_features
from .recovery import During, Moment, OutOfMemoryError, StepStart, keep_last_step, unless_out_of_memory

STATE = "trainer_state.json"  # of a checkpoint
FULL_DISK = "Free some space and go on with --resume (from the last complete checkpoint)."


def train(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> Path:
    """One run, in the folder `recipe.train.output`, which is returned.

    The folder gets `recipe.yaml`, `checkpoints/`, `metrics.jsonl` and, at the end, `adapter/`. With `resume` the run
    goes on from its last complete checkpoint, as if it had never stopped.

    Raises:
        UserError: anything wrong with recipe, data, model or folder; a full disk; or what the first-steps guard finds.
        OutOfMemoryError: memory ran out; the last good step is kept as a checkpoint.
    """
    return run(recipe, starting_point(recipe, resume), console or Console())


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
            fix="Train without --resume; set train.save_every to have checkpoints.",
        )
    return checkpoint


def run(recipe: Recipe, checkpoint: Path | None, console: Console) -> Path:
    """`train` from a checkpoint of the run's folder, or from the start. Raises as `train`."""
    folder = Path(recipe.train.output)
    rows = load_data(recipe.data, "train")
    validation = load_data(recipe.data, "validation") if recipe.data.validation else None
    tasks = sorted(set(rows["task"]))
    _check_tasks(recipe, tasks)
    session = unless_out_of_memory(lambda: open_session(recipe, tasks))
    if session is None:
        raise OutOfMemoryError(Moment("loading", checkpoint), folder)
    with clear_disk_errors(folder, FULL_DISK):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(recipe.with_absolute_paths().to_yaml(), encoding="utf-8")
        if recipe.train.cache_features:
            session = _without_vision(session, [rows, *([validation] if validation else [])], checkpoint, console)
        _fit(session, rows, validation, tasks, checkpoint, console)
        _save_adapter(session, folder)
    return folder


def _without_vision(session: Session, splits: list[Any], checkpoint: Path | None, console: Console) -> Session:
    """The session on cached features. Raises UserError as `with_cached_features`, and OutOfMemoryError."""
    folder = Path(session.recipe.train.output)
    cached = unless_out_of_memory(lambda: with_cached_features(session, splits, folder, console))
    if cached is None:
        raise OutOfMemoryError(Moment("features", checkpoint), folder)
    return cached


def _fit(
    session: Session, rows: Any, validation: Any, tasks: list[str], checkpoint: Path | None, console: Console
) -> None:
    """All steps that are left. Raises OutOfMemoryError, and what callbacks raise."""
    folder, display = Path(session.recipe.train.output), ProgressDisplay(console)
    try:
        trainer = make_trainer(session, rows, validation, folder, display)
        counted: list[Tensor] = []
        if session.recipe.adapter.method == "mixlora":
            routing = RoutingLog(session.model, tasks, folder)
            counted = [routing.statistics.sum_LTEF, routing.statistics.count_T]
            trainer.add_callback(routing)
        start = StepStart([*counted, *(b for name, b in session.model.named_buffers() if "lora_" in name)])
        trainer.add_callback(start)
        trainer.args.eval_on_start = trainer.control.should_evaluate = (
            validation is not None and checkpoint is not None and _was_evaluating(checkpoint)
        )
        # accelerate and PEFT take a path as a string only
        done = unless_out_of_memory(lambda: trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)))
        if done is None:
            keep_last_step(trainer, start, Moment("training", checkpoint).step)
            during: During = "evaluation" if trainer.control.should_evaluate and not start.torn else "training"
            raise OutOfMemoryError(Moment(during, last_checkpoint(folder)), folder)
    finally:
        display.close()


def load_data(data: Data, split: str) -> Any:
    """The conversations of one split of the recipe. Raises UserError if the recipe has no such split."""
    source = getattr(data, split, None) if split in {"train", "validation", "test"} else None
    if source is None:
        have = [name for name in ("train", "validation", "test") if getattr(data, name)]
        raise UserError(f"The recipe has no split {split!r}.", where="data", fix=f"It has: {', '.join(have)}.")
    return load_conversations(source, split=split, image_root=data.image_root, task_field=data.task_field)


def make_trainer(
    session: Session, rows: Any, validation: Any, folder: Path, display: ProgressDisplay
) -> SupervisedTrainer:
    """The Trainer of a session: its arguments, the loss at supervised positions, and our callbacks."""
    enable_checkpointing(session)
    trainer = SupervisedTrainer(
        session.recipe.train.loss_chunk,
        model=session.model,
        args=_arguments(session.recipe, folder, validation is not None),
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=session.collator,
        callbacks=[FirstStepsGuard(session), MetricsLog(folder), display],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def enable_checkpointing(session: Session) -> None:
    """Activation checkpointing as the recipe says, non-reentrant."""
    checkpointing = session.recipe.train.checkpointing
    if not checkpointing.enabled:
        return
    session.model.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False}, every_n_layers=checkpointing.every_n_layers
    )
    if checkpointing.offload:
        decoder = session.model.get_base_model().get_submodule(session.anatomy.language)
        for module in decoder.modules():  # the vision tower is not differentiated and computes nothing again
            if getattr(module, "gradient_checkpointing", False):
                module._gradient_checkpointing_func = _offloaded(module._gradient_checkpointing_func)
    # Only reentrant checkpointing needs inputs with a gradient; with them the frozen vision tower would be
    # differentiated as well, since transformers marks its patch embeddings too.
    session.model.disable_input_require_grads()


def _offloaded(checkpoint: Callable[..., Any]) -> Any:
    """Checkpointing that keeps a layer's input in host memory: pinned where there is a GPU.

    (transformers 5.23 has this as `offload=True`, and asks for pinned memory even where there is no GPU, which fails.)
    """

    def run(*args: Any, **kwargs: Any) -> Any:  # as torch.utils.checkpoint.checkpoint
        with save_on_cpu(pin_memory=torch.cuda.is_available()):
            return checkpoint(*args, **kwargs)

    return run


class SupervisedTrainer(Trainer):
    """Trainer whose loss asks the model for logits at supervised positions only, and normalises over the whole step."""

    def __init__(self, loss_chunk: int | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.loss_chunk = loss_chunk
        self.model_accepts_loss_kwargs = True  # so that Trainer counts supervised tokens over the accumulated batch
        self.can_return_loss = True
        # Trainer collects the micro-batches of a whole step; each goes to the card when its turn comes, not before
        self.accelerator.device_placement = False

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """As Trainer's; nothing after the last step, of which Trainer (5.23) would do one more when resumed there."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        batches: tuple[list[Any], Tensor | int | None] = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss = supervised_loss(model, inputs, num_items_in_batch, chunk=self.loss_chunk)
        return (loss, {"loss": loss}) if return_outputs else loss


def _arguments(recipe: Recipe, folder: Path, evaluates: bool) -> TrainingArguments:
    spec = recipe.train
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        num_train_epochs=spec.epochs,
        max_steps=spec.max_steps or -1,
        per_device_train_batch_size=spec.micro_batch_size,
        per_device_eval_batch_size=spec.eval_batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.schedule if spec.schedule != "constant" else "constant_with_warmup",
        warmup_steps=spec.warmup_ratio,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        optim="adamw_torch" if spec.optimizer == "adamw" else spec.optimizer,
        seed=spec.seed,
        data_seed=spec.seed,
        logging_steps=spec.log_every,
        eval_strategy=("steps" if spec.eval_every else "epoch") if evaluates else "no",
        eval_steps=spec.eval_every,
        save_strategy="steps" if spec.save_every else "no",
        save_steps=spec.save_every or 500,
        save_total_limit=spec.keep_checkpoints,
        dataloader_num_workers=recipe.data.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
        prediction_loss_only=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )


def _check_tasks(recipe: Recipe, tasks: list[str]) -> None:
    if recipe.adapter.route_on == "task" and len(tasks) < 2:
        raise UserError(
            f"adapter.route_on is 'task', but the data has one task only ({tasks[0]}).",
            where="data.train",
            fix="Give samples a task (data.task_field), or route on the instruction.",
        )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run (Trainer writes trainer_state.json last); broken ones are removed."""
    checkpoints = folder / "checkpoints"
    for path in checkpoints.glob("checkpoint-*"):
        if not (path / STATE).is_file():
            shutil.rmtree(path)
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    return Path(last) if last else None


def _was_evaluating(checkpoint: Path) -> bool:
    """Whether memory ran out in the evaluation that was due at this step (ordinary checkpoints come after it)."""
    control = TrainerState.load_from_json(str(checkpoint / STATE)).stateful_callbacks.get("TrainerControl", {})
    return bool(control.get("args", {}).get("should_evaluate", False))


def _save_adapter(session: Session, folder: Path) -> None:
    with put_in_place(folder / "adapter") as place:
        session.model.save_pretrained(str(place))
