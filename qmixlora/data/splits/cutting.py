"""Cut held-out rows from training data: by task, seeded, never parting rows that share an image or are the same."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset

from qmixlora.data.images.keys import image_keys
from qmixlora.errors import UserError

from .identity import text_keys

EXCESS = 0.25  # the share of what is asked for that tasks of few rows may take beyond it
Stratum = str | None  # a task; None: those of few rows, which count as one


@dataclass(frozen=True)
class Cut:
    """Row numbers: those that are held out, and the others; both ascending."""

    held_out: list[int]
    rest: list[int]


def cut(rows: Dataset, amount: int, seed: int, where: str) -> Cut:
    """Hold out so many rows, of every task in proportion.

    Rows that show the same image (the same file, or the same bytes) stay together, and rows without images that have
    the same turns, so that what is held out has not been seen. Where such groups are large, what is held out may be a
    little more or less than was asked for. A task whose share is less than a row has one held out; where that would be
    far too many in all, such tasks count as one. A row of every task is left. The same rows and seed give the same cut.

    Raises:
        UserError: nothing, or nothing else, could be held out.
    """
    tasks: Sequence[str] = rows["task"]
    left_of_task = Counter(tasks)
    stratum_of, left = _strata(left_of_task, amount, amount / len(rows))
    groups = _never_parted(rows)
    random.Random(seed).shuffle(groups)
    held_out: list[int] = []
    for group in groups:
        of_task = Counter(tasks[index] for index in group)
        of_stratum = Counter(stratum_of[tasks[index]] for index in group)
        # half of a group may be too much: then it is as near as without it
        wanted = all(left[stratum] >= count / 2 for stratum, count in of_stratum.items())
        if wanted and all(count < left_of_task[task] for task, count in of_task.items()):
            held_out += group
            left_of_task.subtract(of_task)
            for stratum, count in of_stratum.items():
                left[stratum] -= count
    chosen = set(held_out)
    if not chosen or amount >= len(rows):
        raise UserError(
            f"{amount} rows cannot be cut from {len(rows)}, which are {len(groups)} groups that share no image.",
            where=where,
            fix="Give a file of its own, another share, or more data.",
        )
    return Cut(sorted(chosen), [index for index in range(len(rows)) if index not in chosen])


def _strata(counts: Counter[str], amount: int, share: float) -> tuple[dict[str, Stratum], dict[Stratum, float]]:
    """(the stratum of every task, how many rows are wanted of each stratum): every task is one of its own, but that
    those of few rows are one together where a row of each would be too many.
    """
    few = {task for task, count in counts.items() if share * count < 1 < count}
    excess = len(few) - share * sum(counts[task] for task in few)
    together = excess > max(1.0, EXCESS * amount)
    stratum_of: dict[str, Stratum] = {task: None if together and task in few else task for task in counts}
    wanted: dict[Stratum, float] = {}
    for task, count in counts.items():
        own = 1.0 if task in few and not together else share * count
        wanted[stratum_of[task]] = wanted.get(stratum_of[task], 0.0) + own
    return stratum_of, wanted


def _never_parted(rows: Dataset) -> list[list[int]]:
    """The rows in groups: those that share an image, directly or by way of others, or have none and the same turns."""
    leader = list(range(len(rows)))

    def top(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    first: dict[int, int] = {}
    texts = text_keys(rows)
    for index, keys in enumerate(image_keys(rows).rows()):
        for key in keys or [texts[index]]:
            leader[top(index)] = top(first.setdefault(key, index))
    groups: dict[int, list[int]] = {}
    for index in range(len(rows)):
        groups.setdefault(top(index), []).append(index)
    return list(groups.values())
