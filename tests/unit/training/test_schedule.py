"""A schedule that does not fit the data is told before the first step, with what to set."""

from __future__ import annotations

from typing import Any

import pytest

from qmixlora.recipe import Recipe, steps_of
from qmixlora.training.schedule import schedule_problems


def recipe_of(validation: str | None = None, **train: Any) -> Recipe:
    return Recipe.model_validate(
        {"model": {"id": "x"}, "data": {"train": "x", "validation": validation}, "train": train}
    )


@pytest.mark.parametrize(
    ("samples", "train", "steps"),
    [
        (39, {"micro_batch_size": 2, "gradient_accumulation": 16}, 2),
        (64, {"micro_batch_size": 2, "gradient_accumulation": 16}, 2),
        (65, {"micro_batch_size": 2, "gradient_accumulation": 16}, 3),
        (1000, {"micro_batch_size": 1, "gradient_accumulation": 10, "epochs": 1.5}, 150),
        (39, {"max_steps": 77}, 77),
    ],
)
def test_steps_are_those_of_the_trainer(samples: int, train: dict[str, Any], steps: int) -> None:
    assert steps_of(recipe_of(**train), samples) == steps


def test_few_samples_in_large_steps_are_told() -> None:
    problems = schedule_problems(recipe_of(micro_batch_size=2, gradient_accumulation=16), 39)
    assert "39 samples in steps of 32 are 2 optimiser steps" in problems[0] and "train.epochs" in problems[0]
    assert any("train.log_every=1" in problem for problem in problems)


def test_what_is_saved_or_evaluated_too_late_is_told() -> None:
    problems = schedule_problems(recipe_of("x", gradient_accumulation=1, eval_every=300, save_every=300), 200)
    assert any("train.eval_every=20" in problem for problem in problems)
    assert any("train.save_every=50" in problem for problem in problems)


def test_a_schedule_that_fits_is_not_commented() -> None:
    assert schedule_problems(recipe_of("x", gradient_accumulation=4, save_every=100), 4000) == []
