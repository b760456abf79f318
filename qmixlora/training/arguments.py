"""What a recipe says in transformers' words."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from qmixlora.device import spills
from qmixlora.recipe import Recipe

from .best import SCORE, judged_by
from .trackers import PROJECT, by_transformers

NEVER = 10**9  # steps


def arguments_of(recipe: Recipe, folder: Path, evaluates: bool, workers: int) -> TrainingArguments:
    """The arguments of a run in a folder; it may evaluate, and has so many processes that make batches."""
    spec, judge = recipe.train, judged_by(recipe) if evaluates else None
    arguments = TrainingArguments(
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
        save_strategy="steps" if spec.save_every or judge else "no",
        save_steps=spec.save_every or NEVER,
        metric_for_best_model=judge,
        greater_is_better=judge == SCORE,
        dataloader_num_workers=workers,
        # where the driver spills, memory to pin runs out early, and batches have no way around it
        dataloader_pin_memory=torch.cuda.is_available() and not spills(),
        label_names=["labels"],
        prediction_loss_only=True,
        logging_nan_inf_filter=False,  # it waits for the device in every micro-batch
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=by_transformers(spec.report_to),
        run_name=folder.name,
        project=PROJECT,
    )
    # of several visible GPUs the first: all of them would multiply the micro-batch, or wrap the model around our hooks
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
