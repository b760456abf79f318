"""Intervals hold what they claim, on scores whose distribution is known."""

from __future__ import annotations

import numpy as np
import pytest

from qmixlora.evaluation.intervals import interval, interval_of_tasks, paired_interval


def test_an_interval_is_that_of_the_binomial_distribution() -> None:
    scores = [1.0] * 300 + [0.0] * 100
    low, high = interval(scores)
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert (low, high) == (pytest.approx(0.75 - half, abs=0.006), pytest.approx(0.75 + half, abs=0.006))


def test_a_mean_over_tasks_is_surer_than_each_of_them() -> None:
    task = [1.0, 0.0] * 50
    low, high = interval(task)
    lower, higher = interval_of_tasks(dict.fromkeys("abcd", task))
    assert higher - lower == pytest.approx((high - low) / 2, rel=0.15)  # four independent means


def test_nineteen_of_twenty_intervals_hold_the_true_mean() -> None:
    draws = np.random.default_rng(1)
    held = 0
    for _ in range(100):
        low, high = interval(draws.random(60).tolist())
        held += low <= 0.5 <= high
    assert 88 <= held <= 99


def test_samples_that_both_models_get_right_do_not_blur_a_difference() -> None:
    one = {"a": [1.0] * 90 + [1.0] * 10}
    other = {"a": [1.0] * 90 + [0.0] * 10}
    low, high = paired_interval(one, other)
    assert 0 < low < 0.1 < high
    assert paired_interval(one, one) == (0, 0)
