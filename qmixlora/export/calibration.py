"""The mean mixing matrix of each task (`C_t`): from the run's own record, or from a pass over samples.

Shapes: L adapted layers, E = F factors in a pool.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from safetensors import safe_open
from torch import Tensor

from qmixlora.backbone.hidden_states import run_body
from qmixlora.data import Conversation, indices_by_answer, indices_by_task, load_source
from qmixlora.errors import UserError
from qmixlora.files import clear_read_errors
from qmixlora.mixlora.routing_record import FILE, RoutingStatistics
from qmixlora.mixlora.segments import Tasks
from qmixlora.progress import progress
from qmixlora.session import TunedSession

from .static import Learned
from .targets import WHOLE_COPY

SAMPLES = 512  # per task in a calibration pass


def mixing_matrices(
    session: TunedSession,
    learned: Learned,
    folder: Path,
    calibration_file: str | None,
    tasks: Sequence[str],
    training_rows: Callable[[], Dataset],
) -> dict[str, Tensor]:
    """`C_t` of every task (L x E x F each).

    Taken from the run's own record; from a pass over the calibration file if one is given; for tasks of which the
    record has no sample, from a pass over their training rows. The samples of a calibration file count for the task
    that they name, all of them for a single task. An adapter that routes on the task gives all its samples the same
    matrix: one row tells it exactly, and as it is at the end.

    Raises:
        UserError: a calibration file without samples of a task.
    """
    if not learned.is_mixture:
        return dict.fromkeys(tasks, learned.identity())
    by_label = session.recipe.adapter.route_on == "task"
    use_record = calibration_file is None and not by_label
    matrices = _recorded(folder, learned, tasks) if use_record else {}
    left = [task for task in tasks if task not in matrices]
    if not left:
        return matrices
    rows = load_source(session.recipe.data, calibration_file, "train") if calibration_file else training_rows()
    by_sample = session.recipe.adapter.route_on == "all"  # an instance is a sample, of its last answer's task
    by_task = indices_by_task(rows) if by_sample else indices_by_answer(rows)
    if calibration_file and len(tasks) == 1:
        by_task.setdefault(tasks[0], list(range(len(rows))))
    if lacking := [task for task in left if task not in by_task]:
        raise UserError(
            f"There is no sample of {lacking[0]!r} to calibrate on.", where=calibration_file or "data.train"
        )
    for task in left:
        chosen = rows.select(by_task[task][: 1 if by_label else SAMPLES])
        labels = list(indices_by_answer(chosen))
        with progress(f"routing of {task}") as tell:
            if task in labels:
                matrices[task] = calibrate(session, chosen, labels, tell)[:, labels.index(task)]
            else:  # a calibration file's, all of which is for this task
                matrices[task] = calibrate(session, [_as_task(row, task) for row in chosen], [task], tell)[:, 0]
    return matrices


def calibrate(
    session: TunedSession,
    rows: Sequence[Conversation],
    tasks: Sequence[str],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """`C_t` from one pass over samples, which the run need not have seen (L x T x E x F).

    `tasks` are the T labels among the rows. Every answer counts for its own.
    """
    statistics, done = RoutingStatistics(session.model, tasks), 0
    for batch, tasks_of_batch in forward_passes(session, rows):
        statistics.add(tasks_of_batch)
        done += len(batch)
        on_progress(done, len(rows))
    means, _ = statistics.take()
    return torch.stack(list(means.values()))


def forward_passes(session: TunedSession, rows: Sequence[Conversation]) -> Iterator[tuple[list[Conversation], Tasks]]:
    """Send rows through the model in evaluation mode, without logits but one; yield every batch once it is through, and
    the tasks of its rows.
    """
    with torch.no_grad(), session.evaluating():
        for batch in session.batches(rows):
            inputs = session.on_device(session.collator(batch))
            inputs.pop("labels")
            run_body(session.model, inputs)
            yield batch, inputs["tasks"]


def _as_task(row: Conversation, task: str) -> Conversation:
    return {"turns": row["turns"], "images": row["images"], "task": task}


def _recorded(folder: Path, learned: Learned, tasks: Sequence[str]) -> dict[str, Tensor]:
    """The matrices of those tasks of which the run's record has samples."""
    if not (folder / FILE).is_file():
        return {}
    with clear_read_errors(folder / FILE, WHOLE_COPY), safe_open(folder / FILE, "pt") as file:
        known = json.loads(file.metadata()["tasks"])
        if not json.loads(file.metadata()["layers"]):  # it has no snapshot
            return {}
        mean_LTEF = torch.stack([file.get_tensor(f"{layer}.mean") for layer in learned.pools])
        counts = dict(zip(known, file.get_tensor("count").tolist(), strict=True))
        factors = learned.identity().shape[-1]
        if mean_LTEF.shape[1:] != (len(known), factors, factors):
            raise ValueError(f"its means have the shape {tuple(mean_LTEF.shape)}, and the run {factors} factors")
    return {task: mean_LTEF[:, known.index(task)] for task in tasks if counts.get(task, 0) > 0}
