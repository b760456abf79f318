"""A run that goes on, by the recipe as it is now: Trainer takes some of it from the checkpoint."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback


class AsTheRecipeSays(TrainerCallback):
    """Sets what Trainer (5.23) restores from a checkpoint in place of what the run's start says: how often it logs,
    evaluates and saves, and the learning rate of the next step.

    The rate is that of the schedule over all steps that the run has now. The checkpoint's own, of a run that was
    finished, is 0. Where nothing has changed this changes nothing, to the bit.
    """

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        optimizer: Optimizer | None = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        state.compute_steps(args, state.max_steps)
        schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate wraps it
        assert optimizer is not None and isinstance(schedule, LambdaLR), "Trainer makes them before"
        rates = [
            base * rate(schedule.last_epoch) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates
