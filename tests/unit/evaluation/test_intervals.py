"""Intervals hold what they claim, on scores whose distribution is known."""

from __future__ import annotations

import numpy as np
import pytest

from qmixlora.evaluation.intervals import interval, interval_of_tasks, p_value, paired_interval


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


def test_scores_that_are_all_alike_are_no_certainty() -> None:
    """Wilson's interval, of which the figures for 20 of 20 and 2 of 2 are well known."""
    assert interval([1.0] * 20) == (pytest.approx(0.839, abs=5e-4), 1)
    assert interval([0.0] * 2) == (0, pytest.approx(0.658, abs=5e-4))
    low, high = interval([0.8])
    assert 0 < low < 0.2 and 0.9 < high < 1
    low, high = interval([3.0, 3.0])  # CIDEr has no end at 1
    assert low < 3 == high


def test_a_difference_that_is_the_same_in_few_samples_may_be_none() -> None:
    right, wrong = {"a": [1.0, 1.0]}, {"a": [0.0, 0.0]}
    low, high = paired_interval(wrong, right)
    assert low == -1 and high > 0
    same = {"a": [1.0] * 100}
    low, high = paired_interval(same, same)
    assert -0.05 < low < 0 < high < 0.05


@pytest.mark.parametrize(("tasks", "share"), [(1, 0.5), (20, 0.9)])
def test_intervals_of_tasks_of_one_sample_hold_the_true_mean(tasks: int, share: float) -> None:
    draws = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        scores = {str(task): [float(draws.random() < share)] for task in range(tasks)}
        low, high = interval_of_tasks(scores)
        held += low <= share <= high
    assert held >= 160


def test_the_test_of_a_difference_is_exact_for_few_samples() -> None:
    def p_of(*differences: float) -> float:
        return p_value({"a": differences}, {"a": [0.0] * len(differences)})

    assert p_of(1) == p_of(0, 0, 0) == 1
    assert p_of(1, 1, 1, 1, 1) == pytest.approx(2 / 32, abs=0.01) and p_of(1, 1, 1, 1, 1) > 0.05
    assert p_of(-1, -1, -1, -1, -1, -1, 0, 0) == pytest.approx(2 / 64, abs=0.01)
    assert p_of(0.3, 0.1, 0.1, -0.1) == pytest.approx(8 / 16, abs=0.02)
    assert p_of(0.1, 0.2, -0.3) == pytest.approx(1)
    assert p_of(*[float("nan")] * 8) == 1


@pytest.mark.parametrize(("tasks", "samples"), [(1, 1), (1, 2), (1, 8), (10, 2)])
def test_equally_good_models_seldom_differ(tasks: int, samples: int) -> None:
    draws = np.random.default_rng(3)

    def scores() -> dict[str, list[float]]:
        return {str(task): draws.integers(2, size=samples).astype(float).tolist() for task in range(tasks)}

    assert sum(p_value(scores(), scores()) < 0.05 for _ in range(100)) <= 9  # five of a hundred are expected
