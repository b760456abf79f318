"""A card that is too small now and then, and what runs on it left."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession
from qmixlora.training import SupervisedTrainer, run, train
from qmixlora.training.recovery import During

from .helpers import QUIET

NOISY = {"dropout": 0.1, "task_mix": 0.5}  # draws random numbers and keeps means


@dataclass
class Shortage:
    """Passes for which memory does not suffice: over more than `above` rows, in one step and part of a run or in any;
    of these, the one with the number `nth`, or each.
    """

    step: int | None
    above: int
    during: During | None
    nth: int | None
    passes: int = 0

    def strikes(self, step: int, rows: int, during: During) -> bool:
        """Whether a pass is one of them."""
        if rows <= self.above or self.step not in (None, step) or self.during not in (None, during):
            return False
        self.passes += 1
        return self.nth in (None, self.passes)


class Card:
    """A card that is too small now and then: hooks on the real models that sessions open.

    `steps` are the samples (their first tokens) of every finished optimiser step, and `rates` its learning rate;
    `alive` are the models of earlier attempts that are in memory whenever a session is opened.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shortages: list[Shortage] = []
        self.steps: dict[int, list[Any]] = {}
        self.rates: dict[int, float] = {}
        self.models: list[weakref.ref[Any]] = []
        self.alive: list[int] = []
        self.step, self.seen = 0, list[Any]()
        self.trainer: Callable[[], Any] = lambda: None  # none before the first step, when a run looks at its model
        open_session, fit = run.open_session, SupervisedTrainer.train

        def opened(recipe: Recipe, tasks: list[str]) -> TunedSession:
            gc.collect()
            self.alive.append(sum(model() is not None for model in self.models))
            session = open_session(recipe, tasks)
            self.models.append(weakref.ref(session.model))
            # after the vision tower and the first layer: the step is well under way
            last = session.backbone.model.language_model.layers[1]
            session.model.register_forward_pre_hook(self._note, with_kwargs=True)
            last.register_forward_pre_hook(self._enter)
            return session

        def watched(trainer: Any, **arguments: Any) -> Any:
            self.trainer = weakref.ref(trainer)
            return fit(trainer, **arguments)

        monkeypatch.setattr(run, "open_session", opened)
        monkeypatch.setattr(SupervisedTrainer, "train", watched)

    def runs_out(
        self, *, step: int | None = None, above: int = 0, during: During | None = None, nth: int | None = None
    ) -> None:
        """Let memory run out from now on (see `Shortage`), besides what was said before."""
        self.shortages.append(Shortage(step, above, during, nth))

    def forgets(self) -> None:
        """Let memory suffice again, and forget the steps so far."""
        self.shortages.clear()
        self.steps.clear()

    def _note(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        trainer = self.trainer()
        if trainer is None:
            return
        step = trainer.state.global_step + 1
        if model.training:
            if step != self.step or trainer.model is not model:
                self.step = step
            if all(p.grad is None for p in model.parameters()):
                self.seen = []
            self.seen += [ids[ids != 0].tolist() for ids in kwargs["input_ids"]]
            self.steps[step] = list(self.seen)
            self.rates[step] = trainer.lr_scheduler.get_last_lr()[0]

    def _enter(self, layer: Any, args: Any) -> None:
        trainer = self.trainer()
        if trainer is None:
            return
        step = trainer.state.global_step + layer.training
        during: During = "training" if layer.training else "evaluation"
        struck = [shortage.strikes(step, len(args[0]), during) for shortage in self.shortages]
        if any(struck):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


def resumed_from(folder: Path, step: int, recipe: Recipe, output: Path) -> Path:
    """The run that goes on from an ordinary checkpoint of another one, with an edited recipe."""
    (output / "checkpoints").mkdir(parents=True)
    shutil.copytree(folder / "checkpoints" / f"checkpoint-{step}", output / "checkpoints" / f"checkpoint-{step}")
    spec = recipe.train.model_copy(update={"output": str(output)})
    return train(recipe.model_copy(update={"train": spec}), resume=True, console=QUIET)
