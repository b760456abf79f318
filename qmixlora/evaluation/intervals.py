"""How sure means are: 95 % intervals over the samples of every task, and a test of whether two models differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

DRAWS = 2000  # of the bootstrap
EXCHANGES = 10_000  # of the permutation test
AT_ONCE = 4_000_000  # numbers in memory
TAILS = (2.5, 97.5)  # percentiles
Z = 1.96  # as many standard deviations from the mean, those of the normal distribution
LEVEL = 0.05  # of a test
OF_SCORES, OF_DIFFERENCES = (0.0, 1.0), (-1.0, 1.0)  # where they end, unless some lie beyond


def interval(scores: Sequence[float], ends: tuple[float, float] = OF_SCORES) -> tuple[float, float]:
    """The interval of a task's mean, of one sample or more, by the bootstrap (Efron 1979): its samples drawn again,
    with replacement. The same for the same scores.

    Scores that are all alike drawn again are the same again, however few they are. Of other ones, which may lie at an
    end, there is then as large a share as Wilson's interval (1927) leaves to what none of so many samples was.
    """
    values = np.asarray(scores, dtype=np.float64)
    if (values == values[0]).all():
        mean, others = float(values[0]), Z**2 / (len(values) + Z**2)
        return mean + others * min(0.0, ends[0] - mean), mean + others * max(0.0, ends[1] - mean)
    draws = np.random.default_rng(0)
    means = [
        values[draws.integers(len(values), size=(part, len(values)))].mean(axis=1)
        for part in _parts(DRAWS, len(values))
    ]
    low, high = np.percentile(np.concatenate(means), TAILS)
    return float(low), float(high)


def interval_of_tasks(
    scores: Mapping[str, Sequence[float]], ends: tuple[float, float] = OF_SCORES
) -> tuple[float, float]:
    """The interval of the mean over tasks, each counting the same: how far the ends of the tasks' own intervals are
    from their means, added in squares (Newcombe 1998; Zou and Donner 2008).
    """
    means = [sum(own) / len(own) for own in scores.values()]
    lows, highs = zip(*(interval(own, ends) for own in scores.values()), strict=True)
    mean, tasks = sum(means) / len(means), len(means)
    return mean - math.dist(means, lows) / tasks, mean + math.dist(means, highs) / tasks


def paired_interval(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """The interval of the difference between two models' means over tasks (one - other), on the same samples in the
    same order.
    """
    return interval_of_tasks(_differences(one, other), OF_DIFFERENCES)


def p_value(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> float:
    """How often two models' means over tasks are as far apart, in either direction, if in any sample the one might as
    well have been the other: the paired permutation test (Fisher 1935; Noreen 1989), with 10,000 draws.

    It holds for any metric and any number of samples; with fewer than six that differ it is never below 0.05.
    """
    shares = np.concatenate([np.asarray(own) / len(own) for own in _differences(one, other).values()])
    shares = shares[shares != 0]
    difference, draws, as_far = shares.sum(), np.random.default_rng(0), 0
    distance = abs(difference) - 1e-9 * np.abs(shares).sum()  # equal sums are rounded differently
    for part in _parts(EXCHANGES, len(shares)):
        exchanged = draws.integers(2, size=(part, len(shares)), dtype=bool)
        nearer = np.abs(difference - 2 * (exchanged @ shares)) < distance  # never by NaN, which earlier releases kept
        as_far += int(np.count_nonzero(~nearer))
    return (1 + as_far) / (1 + EXCHANGES)


def _differences(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {task: [a - b for a, b in zip(own, other[task], strict=True)] for task, own in one.items()}


def _parts(draws: int, samples: int) -> Iterator[int]:
    """Draws of so many samples, as many at a time as there is memory for."""
    at_once = max(1, AT_ONCE // max(1, samples))
    return (min(at_once, draws - start) for start in range(0, draws, at_once))
