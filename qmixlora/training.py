"""The run: a session and its data on transformers' Trainer, from the first step to the saved adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from .callbacks import FirstStepsGuard, MetricsLog, ProgressDisplay, RoutingLog
from .data import load_conversations
from .errors import UserError
from .files import clear_disk_errors, put_in_place
from .loss import supervised_loss
from .recipe import Data, Recipe
from .session import Session, open_session

FULL_DISK = "Free some space and go on with --resume (from the last complete checkpoint)."


def train(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> Path:
    """One run, in the folder `recipe.train.output`, which is returned.

    The folder gets `recipe.yaml`, `checkpoints/`, `metrics.jsonl` and, at the end, `adapter/`. With `resume` the run
    goes on from its last complete checkpoint, as if it had never stopped.

    Raises:
        UserError: anything wrong with recipe, data, model or folder; a full disk; or what the first-steps guard finds.
    """
    console = console or Console()
    folder = Path(recipe.train.output)
    checkpoint = _last_checkpoint(folder) if resume else None
    if not resume and folder.exists() and any(folder.iterdir()):
        raise UserError(
            "The run's folder is not empty.",
            where=str(folder),
            fix="Go on with --resume, choose another train.output, or remove the folder.",
        )
    rows = load_data(recipe.data, "train")
    validation = load_data(recipe.data, "validation") if recipe.data.validation else None
    tasks = sorted(set(rows["task"]))
    _check_tasks(recipe, tasks)
    session = open_session(recipe, tasks)
    with clear_disk_errors(folder, FULL_DISK):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(recipe.with_absolute_paths().to_yaml(), encoding="utf-8")
        display = ProgressDisplay(console)
        try:
            trainer = make_trainer(session, rows, validation, folder, display)
            if recipe.adapter.method == "mixlora":
                trainer.add_callback(RoutingLog(session.model, tasks, folder))
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            display.close()
        _save_adapter(session, folder)
    return folder


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
        activation_checkpointing_kwargs={"use_reentrant": False},
        every_n_layers=checkpointing.every_n_layers,
        offload=checkpointing.offload,
    )
    # Only reentrant checkpointing needs inputs with a gradient; with them the frozen vision tower would be
    # differentiated as well, since transformers marks its patch embeddings too.
    session.model.disable_input_require_grads()


class SupervisedTrainer(Trainer):
    """Trainer whose loss asks the model for logits at supervised positions only, and normalises over the whole step."""

    def __init__(self, loss_chunk: int | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.loss_chunk = loss_chunk
        self.model_accepts_loss_kwargs = True  # so that Trainer counts supervised tokens over the accumulated batch
        self.can_return_loss = True

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


def _last_checkpoint(folder: Path) -> str:
    """The newest complete checkpoint (Trainer writes trainer_state.json last); broken ones are moved out of the way."""
    checkpoints = folder / "checkpoints"
    for path in checkpoints.glob("checkpoint-*"):
        if not (path / "trainer_state.json").is_file():
            shutil.rmtree(path)
    last: str | None = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if last is None:
        raise UserError(
            "There is no checkpoint to resume from.",
            where=str(checkpoints),
            fix="Train without --resume; set train.save_every to have checkpoints.",
        )
    return last


def _save_adapter(session: Session, folder: Path) -> None:
    with put_in_place(folder / "adapter") as place:
        session.model.save_pretrained(str(place))
