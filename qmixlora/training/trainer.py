"""transformers' Trainer with the loss at supervised positions, the recipe's arguments, and our callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes.optim.optimizer import GlobalOptimManager
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from qmixlora.backbone.levers import chunk_mlps, enable_checkpointing
from qmixlora.device import peak_memory_gib
from qmixlora.loss import supervised_loss
from qmixlora.manifest import promise
from qmixlora.session import TunedSession

from .arguments import arguments_of
from .best import LOSS, Examination, Judge, evaluations_since, wins_a_tie
from .callbacks import MetricsLog, ProgressDisplay
from .checkpoints import checkpoint_at
from .data_parallel import Meeting, deal, is_idle
from .finite import SAMPLES, FiniteParameters, FiniteSteps, NamingCollator, NumberedRows
from .gradient_scale import GradientScale
from .guard import FirstStepsGuard
from .resuming import AsTheRecipeSays
from .sampling import (
    SeededLengthGroupedSampler,
    StepGroupedSampler,
    TokenBatchSampler,
    check_one_process,
    lengths_for,
)
from .seen import Seen
from .trackers import own_callbacks, show_answers
from .validation_loss import ValidationLoss
from .workers import ErrorCarrier, loader_workers, unless_error


def make_trainer(
    session: TunedSession,
    rows: Dataset,
    validation: Dataset | None,
    folder: Path,
    display: ProgressDisplay,
    *,
    checks_numbers: bool = True,
) -> SupervisedTrainer:
    """The Trainer of a session: its arguments, the loss at supervised positions, and our callbacks.

    `checks_numbers`: the rows are real ones: numbers have to be finite, or the rows are named (see `FiniteSteps`).
    """
    recipe = session.recipe
    enable_checkpointing(session.backbone, session.anatomy, recipe.train.checkpointing)
    chunk_mlps(session.backbone, session.anatomy, recipe.train.mlp_chunk)
    lengths = lengths_for(session, rows)
    workers = loader_workers(recipe.data.num_workers, len(rows))
    steps = FiniteSteps(recipe, folder, display.say)
    collator = NamingCollator(session.collator) if checks_numbers else session.collator
    trainer = SupervisedTrainer(
        recipe.train.loss_chunk,
        recipe.model.dtype == "float16",
        steps,
        lengths,
        recipe.train.batch_tokens,
        model=session.model,
        args=arguments_of(recipe, folder, validation is not None, workers),
        train_dataset=NumberedRows(rows),
        eval_dataset=validation,
        data_collator=ErrorCarrier(collator) if workers else collator,
        callbacks=[
            *own_callbacks(recipe.train.report_to, folder),
            AsTheRecipeSays(),
            FirstStepsGuard(session, steps),
            MetricsLog(folder),
            Judge.of(recipe, validation, display.say),
            display,
        ],
    )
    trainer.checks_numbers, trainer.within_steps = checks_numbers, recipe.data.group_by_length == "step"
    trainer.examination, trainer.patience = Examination.of(session, validation), recipe.train.early_stopping
    if trainer.examination is not None and recipe.train.report_to:
        trainer.examination = replace(trainer.examination, show=partial(show_answers, trainer, recipe.train.report_to))
    trainer.say = display.say
    if checks_numbers:
        trainer.add_callback(FiniteParameters(session.recipe))
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


class SupervisedTrainer(Trainer):
    """A Trainer whose loss asks for logits at supervised positions only, and normalises over the whole step.

    With the `lengths` of the training samples, those of about one length come together (`within_steps`: those of one
    optimiser step); with `batch_tokens` too, as many to a micro-batch as have so many tokens, padding included.
    """

    def __init__(
        self,
        loss_chunk: int | None,
        in_float16: bool,
        steps: FiniteSteps,
        lengths: Sequence[int] | None = None,
        batch_tokens: int | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.meeting = Meeting(arguments["model"])
        # in place of a model that accelerate has wrapped
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.loss_chunk, self.lengths, self.batch_tokens = loss_chunk, lengths, batch_tokens
        self.within_steps = False
        self.seen = Seen()
        check_one_process(batch_tokens, self.accelerator.num_processes)
        self.steps, self.checks_numbers = steps, True
        self.undo_forward: Callable[[], None] = lambda: None  # of a step that is skipped: what its passes have added up
        self.announce: Callable[[Iterator[str]], None] = lambda tasks: None  # those of the samples of the next step
        self.stop_if_asked: Callable[[], None] = lambda: None  # called where a run can stop
        self.also_logged: Callable[[], dict[str, float]] = lambda: {}
        self.validation_loss = ValidationLoss()  # of one evaluation
        self.examination: Examination | None = None
        self.patience: int | None = None  # evaluations without a better one
        self.say: Callable[[str], None] = lambda text: None
        self.gradient_scale = GradientScale(arguments["model"]) if in_float16 else None
        self.model_accepts_loss_kwargs = True  # so that Trainer counts supervised tokens over the accumulated batch
        self.can_return_loss = True
        # Trainer collects the micro-batches of a whole step; each goes to the card when its turn comes, not before
        self.accelerator.device_placement = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does, and let go of the model afterwards.

        With an 8-bit optimiser, Trainer (5.23) registers every embedding with bitsandbytes' process-wide
        `GlobalOptimManager`, which would keep the weights on the card for the next attempt.
        """
        self.meeting.begin()
        try:
            return super().train(*args, **kwargs)
        finally:
            GlobalOptimManager.get_instance().initialize()
            if self.gradient_scale is not None:
                self.gradient_scale.let_go()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Collect a step's batches as Trainer does, and none after the last step.

        Resumed at its last step, Trainer (5.23) would do one more.
        """
        if self.state.global_step >= self.state.max_steps:
            return [], None
        self.stop_if_asked()
        checked = unless_error(epoch_iterator)
        batches: tuple[list[Any], Tensor | int | None] = super().get_batch_samples(checked, num_batches, device)
        self.seen.add(batches[0])
        rows = (own for batch in batches[0] for own in batch.get("tasks", ()))  # a row may have several
        self.announce(task for own in rows for task in ([own] if isinstance(own, str) else own))
        return batches

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Trainer does, by `ValidationLoss`, and score generated answers where the recipe asks for it."""
        self.validation_loss = ValidationLoss()
        output = super().evaluation_loop(*args, **kwargs)
        metrics = {**(output.metrics or {}), LOSS: self.validation_loss.mean()}
        if self.examination is not None:
            metrics |= self.examination.metrics(lambda done: self.stop_if_asked())
        return output._replace(metrics=metrics)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Evaluate as Trainer does. One that is made up for at the start, where Trainer judges nothing, counts too."""
        metrics: dict[str, float] = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if skip_scheduler:
            self._determine_best_metric(metrics, trial)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Judge as Trainer does; save the best at once, and stop where it has been the best for long enough."""
        is_best: bool = super()._determine_best_metric(metrics, trial)
        key = self.args.metric_for_best_model
        if key is None:
            return is_best
        if wins_a_tie(self.state, key, metrics):
            self.state.best_global_step, is_best = self.state.global_step, True
        self.control.should_save |= is_best
        if self.patience is not None and (since := evaluations_since(self.state, key)) >= self.patience:
            self.control.should_training_stop = self.control.should_save = True  # it may be told to go on
            self.say(
                f"Stopped early: {since} evaluations were not better than that of step {self.state.best_global_step}."
            )
        return is_best

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """The loader as Trainer makes it; of several processes, each has its part of the rows."""
        return deal(super().get_eval_dataloader(eval_dataset))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as Trainer does, into a folder that says it is not whole until `SealedCheckpoints` has sealed it."""
        assert self.args.output_dir is not None, "a run has a folder"
        if self.args.should_save:
            promise(checkpoint_at(self.args.output_dir, self.state.global_step))
        super()._save_checkpoint(model, trial)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        if self.lengths is None:
            sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
            return sampler
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        kind = StepGroupedSampler if self.within_steps else SeededLengthGroupedSampler
        return kind(step, self.lengths, self.args.seed)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Make micro-batches as Trainer does, or by tokens; of several processes, each has its part of every step."""
        if self.batch_tokens is None:
            return deal(super().get_train_dataloader())
        assert self.lengths is not None and self.train_dataset is not None, "given together"
        sampler = TokenBatchSampler(self.batch_tokens, self.lengths, self.args.seed)
        workers, pinned = self.args.dataloader_num_workers, self.args.dataloader_pin_memory
        how: dict[str, Any] = {"collate_fn": self.data_collator, "num_workers": workers, "pin_memory": pinned}
        by_tokens = DataLoader(self.train_dataset, batch_sampler=sampler, **how)
        return cast(DataLoader[Any], self.accelerator.prepare(by_tokens))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Send a batch to the card as Trainer does, but for what is looked up on the host: the positions of labels, and
        where segments lie.
        """
        [inputs] = unless_error([inputs])
        kept: dict[str, Any] = {name: inputs[name] for name in ("labels", "segments") if name in inputs}
        return {**super()._prepare_inputs({k: v for k, v in inputs.items() if k not in kept and k != SAMPLES}), **kept}

    def _prepare_input(self, data: Any) -> Any:
        """Send a tensor as Trainer does, without waiting until the card has taken it: batches are pinned."""
        if isinstance(data, Tensor):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Take a micro-batch as Trainer does, and note its loss and its samples for the judgement of the step."""
        if is_idle(inputs):
            return self.meeting.nothing()
        step = super().training_step
        loss = self.meeting.attempt(lambda: step(model, inputs, num_items_in_batch))
        self.steps.add(loss, inputs.get(SAMPLES, ()))
        return loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch as Trainer computes it; nothing, where this process has no row left."""
        if is_idle(inputs):
            self._get_num_items_in_batch([inputs], self.args.device)  # the others count with this process
            return self.meeting.nothing(), None, None
        loss, *others = super().prediction_step(model, inputs, *args, **kwargs)
        assert loss is not None, "every batch has labels"
        self.validation_loss.add(loss, inputs["labels"])
        return loss, *others

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip as Trainer does, when all processes have met. A step that is not finite raises, or loses its gradients:
        then no optimiser moves.

        Raises NotFiniteError as `FiniteSteps`, and OutOfMemoryInStep as `Meeting`.
        """
        self.meeting.meet(idle=not self.steps.batches)
        norm: Tensor = super()._clip_grad_norm(model)
        if self.checks_numbers and not self.steps.may_be_taken(self.state.global_step + 1, norm):
            model.zero_grad(set_to_none=True)
            self.undo_forward()
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does, with the losses of the steps that were taken (its own sum keeps a NaN for ever)."""
        seen = self.seen.take() if "loss" in logs else {}
        extra = {**self.also_logged(), **seen, "memory_gib": peak_memory_gib()}
        super().log({**self.steps.in_logs(logs), **extra}, start_time)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not model.training:  # the mean over the batch's own tokens, which `ValidationLoss` weighs
            num_items_in_batch = None
        loss = supervised_loss(model, inputs, num_items_in_batch, chunk=self.loss_chunk)
        if self.gradient_scale is not None and num_items_in_batch is not None:
            loss = self.gradient_scale(loss, num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss
