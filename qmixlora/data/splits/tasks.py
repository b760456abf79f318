"""The tasks of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import compress, repeat
from typing import Any

from datasets import Dataset

from qmixlora.data.reading.store import records
from qmixlora.errors import UserError


def indices_by_task(rows: Dataset) -> dict[str, list[int]]:
    """The positions of every task's samples (of several answers, the last one's task counts), sorted by its name."""
    return _inverted([row["task"]] for row in records(rows.select_columns(["task"])))


def indices_by_answer(rows: Dataset) -> dict[str, list[int]]:
    """The positions of the samples that have an answer of a task to be learned, of every task, sorted by its name."""
    if "tasks" not in rows.column_names:
        return indices_by_task(rows)
    columns = [name for name in ("task", "tasks", "learned") if name in rows.column_names]
    return _inverted(map(_learned_tasks, records(rows.select_columns(columns))))


def _learned_tasks(row: Mapping[str, Any]) -> Iterable[str]:
    return compress(row["tasks"], row.get("learned") or repeat(True)) if row["tasks"] else [row["task"]]


def _inverted(tasks: Iterable[Iterable[str]]) -> dict[str, list[int]]:
    indices: dict[str, list[int]] = {}
    for index, own in enumerate(tasks):
        for task in dict.fromkeys(own):
            indices.setdefault(task, []).append(index)
    return dict(sorted(indices.items()))


def only_tasks(rows: Dataset, tasks: Iterable[str], where: str) -> Dataset:
    """The rows of some tasks, in their order. Raises UserError as `indices_of_tasks`."""
    return rows.select(indices_of_tasks(rows, tasks, where))


def indices_of_tasks(rows: Dataset, tasks: Iterable[str], where: str) -> list[int]:
    """The positions of the samples of some tasks, ascending. Raises UserError for a task that the data has not."""
    indices = indices_by_task(rows)
    chosen: set[int] = set()
    for task in tasks:
        if task not in indices:
            known = ", ".join(indices)
            raise UserError(f"There is no task {task!r} in the data.", where=where, fix=f"Its tasks: {known}.")
        chosen.update(indices[task])
    return sorted(chosen)
