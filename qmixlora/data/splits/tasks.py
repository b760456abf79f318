"""The tasks of a data set."""

from __future__ import annotations

from collections.abc import Iterable

from datasets import Dataset

from qmixlora.errors import UserError


def indices_by_task(rows: Dataset) -> dict[str, list[int]]:
    """The positions of every task's samples, the tasks sorted by name."""
    indices: dict[str, list[int]] = {}
    for index, task in enumerate(rows["task"]):
        indices.setdefault(task, []).append(index)
    return dict(sorted(indices.items()))


def only_tasks(rows: Dataset, tasks: Iterable[str], where: str) -> Dataset:
    """The rows of some tasks. Raises UserError for a task that the data does not have."""
    indices = indices_by_task(rows)
    chosen: list[int] = []
    for task in tasks:
        if task not in indices:
            known = ", ".join(indices)
            raise UserError(f"There is no task {task!r} in the data.", where=where, fix=f"Its tasks: {known}.")
        chosen += indices[task]
    return rows.select(chosen)
