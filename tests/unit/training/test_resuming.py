"""A run goes on by the recipe as it is now: how often it logs, evaluates and saves, and the rate of its next step."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qmixlora.files import read_log
from qmixlora.recipe import Recipe
from qmixlora.training import train
from qmixlora.training.checkpoints import step_of

from .helpers import QUIET
from .test_best import STANDS_STILL, finish, weights


@pytest.fixture
def make(make_recipe: Callable[..., Recipe], data: Path) -> Callable[..., Recipe]:
    return lambda **spec: make_recipe(data={"validation": str(data / "test.json")}, train=spec)


def logged(run: Path, key: str) -> list[int]:
    return [record["step"] for record in read_log(run / "metrics.jsonl") if key in record]


@pytest.mark.parametrize(
    ("before", "after", "logs", "evaluations", "saved"),
    [
        ((9, 9, 2), (1, 2, 1), [3, 4, 5, 6], [2, 4, 6], [5, 6]),
        ((1, 1, 1), (3, 3, 3), [1, 2, 3, 6], [1, 2, 3, 6], [3, 6]),
    ],
)
def test_logs_evaluations_and_checkpoints_come_as_often_as_the_resumed_recipe_says(
    make: Callable[..., Recipe], before: Any, after: Any, logs: list[int], evaluations: list[int], saved: list[int]
) -> None:
    def spec(every: tuple[int, int, int], steps: int) -> Recipe:
        log, evaluation, save = every
        return make(max_steps=steps, log_every=log, eval_every=evaluation, save_every=save, micro_batch_size=2)

    run = train(spec(before, 2), console=QUIET)
    train(spec(after, 6), resume=True, console=QUIET)
    assert logged(run, "loss") == logs
    assert logged(run, "eval_loss") == evaluations
    assert sorted(map(step_of, (run / "checkpoints").glob("checkpoint-*"))) == saved


def test_the_first_further_step_has_the_rate_of_the_longer_schedule(make_recipe: Callable[..., Recipe]) -> None:
    """At the end of the shorter one it is 0, so that the step would learn nothing."""
    spec = {"save_every": 2, "micro_batch_size": 2, "learning_rate": 1e-2}
    run = train(make_recipe(train={**spec, "max_steps": 2}), console=QUIET)
    before = weights(run / "adapter")
    train(make_recipe(train={**spec, "max_steps": 3}), resume=True, console=QUIET)
    factors = [name for name in before if name.endswith(("mixlora_A", "mixlora_B"))]
    moved = [name for name, tensor in weights(run / "adapter").items() if not tensor.equal(before[name])]
    assert factors and {*factors} <= {*moved}


def test_a_run_that_stopped_early_can_go_on(make: Callable[..., Recipe]) -> None:
    run = train(make(**STANDS_STILL, early_stopping=2), console=QUIET)
    assert finish(run)["step"] == 3 and (run / "checkpoints" / "checkpoint-3").is_dir()
    screen = io.StringIO()
    train(make(**STANDS_STILL, early_stopping=2), resume=True, console=Console(file=screen, width=200))
    assert "It stopped early, at step 3 of 8; to go on: train.early_stopping=null." in screen.getvalue()
    train(make(**STANDS_STILL), resume=True, console=QUIET)
    assert finish(run)["step"] == 8 and logged(run, "eval_loss") == [1, 2, 3, 4, 5, 6, 7, 8]
