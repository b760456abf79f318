"""Cut held-out rows from training data: by task, seeded, and never parting rows that share an image."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset

from qmixlora.data.images.keys import image_keys
from qmixlora.errors import UserError


@dataclass(frozen=True)
class Cut:
    """Row numbers: those that are held out, and the others; both ascending."""

    held_out: list[int]
    rest: list[int]


def cut(rows: Dataset, amount: int, seed: int, where: str) -> Cut:
    """Hold out so many rows, of every task in proportion.

    Rows that show the same image (the same file, or the same bytes) stay together, so that what is held out has not
    been seen. Where such groups are large, what is held out may be a little more or less than was asked for. The same
    rows and seed give the same cut.

    Raises:
        UserError: nothing, or nothing else, could be held out.
    """
    tasks: Sequence[str] = rows["task"]
    counts = Counter(tasks)
    share = amount / len(rows)
    wanted = {task: max(1.0, share * count) if count > 1 else share * count for task, count in counts.items()}
    groups = _sharing_images(rows)
    random.Random(seed).shuffle(groups)
    held_out: list[int] = []
    left = dict(wanted)
    for group in groups:
        of_task = Counter(tasks[index] for index in group)
        # half of a group may be too much: then it is as near as without it
        if all(left[task] >= count / 2 and count < counts[task] for task, count in of_task.items()):
            held_out += group
            for task, count in of_task.items():
                left[task] -= count
    chosen = set(held_out)
    if not chosen or len(chosen) == len(rows):
        raise UserError(
            f"{amount} rows cannot be cut from {len(rows)}, which are {len(groups)} groups that share no image.",
            where=where,
            fix="Give a file of its own, another share, or more data.",
        )
    return Cut(sorted(chosen), [index for index in range(len(rows)) if index not in chosen])


def _sharing_images(rows: Dataset) -> list[list[int]]:
    """The rows in groups: those that share an image, directly or by way of others."""
    leader = list(range(len(rows)))

    def top(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    first: dict[int, int] = {}
    for index, keys in enumerate(image_keys(rows).rows()):
        for key in keys:
            leader[top(index)] = top(first.setdefault(key, index))
    groups: dict[int, list[int]] = {}
    for index in range(len(rows)):
        groups.setdefault(top(index), []).append(index)
    return list(groups.values())
