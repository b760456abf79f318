"""First pass of an export: the live model, measured on the rows of every target.

Shapes: L adapted layers, E = F factors in a pool.
"""

from __future__ import annotations

from dataclasses import dataclass

from datasets import Dataset, concatenate_datasets
from torch import Tensor

from qmixlora.data import Conversation, held_out_split, indices_by_task
from qmixlora.session import TunedSession

from .calibration import mixing_matrices
from .job import Job, rows_of
from .measurement import LiveUpdates, Measurement, measure, measure_updates
from .polished import Polished, fingerprint_of, kept
from .static import Learned
from .targets import Target, make_targets, tasks_of

CHECKED = 128  # rows per task on which it is decided whether a mean lost something
COMPARED = 4  # held-out rows whose logits hold a merged checkpoint against its adapter


@dataclass(frozen=True)
class Check:
    """The rows on which it is decided whether a mean lost something: of `source`, with the live model's measurement;
    and the training rows to polish on, which are others.
    """

    source: str
    rows: Dataset
    live: Measurement
    polish_on: Dataset


@dataclass(frozen=True)
class Live:
    """The live model on one target: its mixing matrices, and its measurement and updates on held-out rows.

    `fingerprint` is that of its polishing (None: there is none), `polished` what came of an earlier one like it.
    """

    target: Target
    mix_LEF: Tensor
    split: str
    rows: Dataset
    measurement: Measurement
    updates: LiveUpdates
    fingerprint: str | None
    polished: Polished | None
    check: Check | None  # without one, the user decides, or an earlier export has

    @property
    def unmeasured(self) -> list[str]:
        """The tasks of the target that have no row among those that are measured."""
        return _lacking(self.target, self.rows)

    @property
    def compared(self) -> list[Conversation]:
        """The rows whose logits hold a merged checkpoint against its adapter."""
        return [self.rows[index] for index in range(min(COMPARED, len(self.rows)))]


def measure_live(job: Job, session: TunedSession, learned: Learned) -> list[Live]:
    """Find the mixing matrices of every target, and measure the live model on its rows."""
    request = job.request
    tasks = tasks_of(job.folder, lambda: job.training_rows)
    targets = make_targets(request, tasks)
    wanted = [task for task in tasks if any(task in target.shares for target in targets)]
    matrices = mixing_matrices(session, learned, job.folder, request.calibration, wanted, lambda: job.training_rows)
    samples = request.samples or job.recipe.export.samples
    measured = []
    for number, target in enumerate(targets, start=1):
        job.say(f"{number}/{len(targets)} {target.name}: measuring the live model")
        split = _measured_on(job, target)
        rows, mix_LEF = rows_of(job.rows(split), target, samples, split), target.mixing_matrix(matrices)
        fingerprint = fingerprint_of(job, target, mix_LEF) if job.polish_steps else None
        polished = None if fingerprint is None else kept(job, target, fingerprint)
        decides = fingerprint is not None and polished is None and request.polish is None
        measured.append(
            Live(
                target,
                mix_LEF,
                split,
                rows,
                measure(session, rows),
                measure_updates(session, learned, rows),
                fingerprint,
                polished,
                _check(job, session, target) if decides else None,
            )
        )
    return measured


def _measured_on(job: Job, target: Target) -> str:
    """The split of a target's rows: the training data, said so, where its tasks are too small to have any held out.

    Where only some of them are, these alone are measured, which is said too.
    """
    split = held_out_split(job.recipe.data)
    lacking = _lacking(target, job.rows(split))
    if split == "train" or not lacking:
        return split
    if len(lacking) < len(target.shares):
        job.say(f"{target.name}: no sample of {', '.join(lacking)} is in the split {split}; measured without.")
        return split
    job.say(f"{target.name}: no sample of it is in the split {split}; measured on samples that it was trained on.")
    return "train"


def _lacking(target: Target, rows: Dataset) -> list[str]:
    """The tasks of a target that have none of the rows."""
    by_task = indices_by_task(rows)
    return [task for task in target.shares if task not in by_task]


def _check(job: Job, session: TunedSession, target: Target) -> Check:
    """Validation rows of the target's tasks; of tasks that have none, training rows that polishing leaves out."""
    training, validation = rows_of(job.training_rows, target, None, "train"), job.validation_rows
    held_out = {} if validation is None else indices_by_task(validation)
    set_aside = {
        index
        for task, own in indices_by_task(training).items()
        if task not in held_out
        for index in own[:: max(5, len(own) // CHECKED)]
    }
    parts = {}
    if validation is not None and not target.shares.keys().isdisjoint(held_out):
        parts["validation"] = rows_of(validation, target, CHECKED, "validation")
    if set_aside:
        parts["train, left out of polishing"] = training.select(sorted(set_aside))
    rows = concatenate_datasets(list(parts.values()))
    polish_on = training.select([index for index in range(len(training)) if index not in set_aside])
    return Check(" and ".join(parts), rows, measure(session, rows), polish_on)
