"""How sure a mean is: 95 % intervals by the bootstrap (Efron 1979), over the samples of every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

DRAWS = 2000
AT_ONCE = 4_000_000  # numbers in memory
TAILS = (2.5, 97.5)  # percentiles


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """The interval of a task's mean: its samples drawn again, with replacement. The same for the same scores."""
    return interval_of_tasks({"": scores})


def interval_of_tasks(scores: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """The interval of the mean over tasks, each counting the same; samples are drawn within their task."""
    draws = np.random.default_rng(0)
    low, high = np.percentile(np.mean([_means(own, draws) for own in scores.values()], axis=0), TAILS)
    return float(low), float(high)


def paired_interval(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """The interval of the difference between two models' means over tasks (one - other), on the same samples in the
    same order. They differ where 0 is outside.
    """
    return interval_of_tasks(
        {task: [a - b for a, b in zip(own, other[task], strict=True)] for task, own in one.items()}
    )


def _means(scores: Sequence[float], draws: np.random.Generator) -> np.ndarray:
    values = np.asarray(scores, dtype=np.float64)
    at_once = max(1, AT_ONCE // len(values))
    parts = [min(at_once, DRAWS - start) for start in range(0, DRAWS, at_once)]
    return np.concatenate(
        [values[draws.integers(len(values), size=(part, len(values)))].mean(axis=1) for part in parts]
    )
