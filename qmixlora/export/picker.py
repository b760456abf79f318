"""The picker of a run's exports, for servers that take one adapter per request (see `serving/pick.py`).

It is fitted on the run's own instructions: the mean of an instruction's input embeddings, which `route_on: embedding`
routes on too, and its task. Linear discriminant analysis with shrinkage; being linear, it folds into the embeddings.

Shapes: N instructions, D width of the embeddings, V tokens of the vocabulary, K = T - 1 dimensions, T tasks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor

from qmixlora.data import Conversation, indices_by_answer, words
from qmixlora.data.reading.store import records
from qmixlora.files import replacing
from qmixlora.serving import pick
from qmixlora.session import Session

from .embeddings import all_embedded, embedded
from .fidelity import FIDELITY
from .job import FOLDER, Job
from .live import Live
from .names import folder_names
from .targets import Form, tasks_of

PICKER = "picker"
SAMPLES = 512  # per task, whose instructions it is fitted on
SHRINKAGE = 0.7  # of the covariance within tasks; from 0.5 on, other words than in training are told better
RULE = (
    "Mean of the rows in `tokens` of the instruction's tokens (tokenizer.json, without special ones); the nearest row "
    "of `means` (Euclidean) is the task, in the order of `names`: task to folder, without its form."
)
NO_PICKER = (
    "No picker: {tokenizer}, the model's tokenizer, is Python code, which `qmixlora pick` can't carry. Requests have to"
    " name their export."
)


@dataclass(frozen=True)
class FittedPicker:
    """A picker before it is written: every token's row, every task's mean, the exports' names by task, and the largest
    distance of an instruction from its own mean.
    """

    tokens_VK: Tensor
    means_TK: Tensor
    names: dict[str, str]
    radius: float
    tokenizer: Any

    def write(self, folder: Path) -> None:
        """Write it, its tokenizer and a client into the folder."""
        about = {"names": json.dumps(self.names), "radius": repr(self.radius), "rule": RULE}
        with replacing(folder) as temporary:
            temporary.mkdir()
            tensors = {"tokens": self.tokens_VK.contiguous(), "means": self.means_TK.contiguous()}
            save_file(tensors, temporary / pick.PICKER, about)
            self.tokenizer.save(str(temporary / pick.TOKENIZER))
            shutil.copyfile(pick.__file__, temporary / "pick.py")


def make_picker(job: Job, session: Session, live: Sequence[Live]) -> FittedPicker | None:
    """Fit a picker among the exports of single tasks: those that are being made, and those in place.

    None where they are not two, or where the model's tokenizer has no form of its own for the client to read, which is
    said.
    """
    names, tokenizer = _names(job, live), job.collator.processor.tokenizer
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        return fit_picker(session, tokenizer, job.training_rows, names)
    if len(names) > 1:
        job.say(NO_PICKER.format(tokenizer=type(tokenizer).__name__))
    return None


def fit_picker(session: Session, tokenizer: Any, rows: Dataset, names: Mapping[str, str]) -> FittedPicker | None:
    """Fit a picker on the instructions of some tasks among the rows; `names` are those of their exports. None where
    they are not two.
    """
    by_task = _instructions(rows, names)
    if len(by_task) < 2:
        return None
    backend = tokenizer.backend_tokenizer
    ids = {task: [tokenizer(text, add_special_tokens=False)["input_ids"] for text in by_task[task]] for task in by_task}
    conditions = [torch.stack([embedded(session, one).double().mean(dim=0) for one in own]) for own in ids.values()]
    center_D, fit_DK = discriminant(conditions)
    placed = [(own_ND - center_D) @ fit_DK for own_ND in conditions]
    means_TK = torch.stack([own_NK.mean(dim=0) for own_NK in placed])
    radius = max(float((own_NK - own_NK.mean(dim=0)).norm(dim=1).max()) for own_NK in placed)
    chunks = all_embedded(session, tokenizer)
    tokens_VK = torch.cat([((rows_VD.double() - center_D) @ fit_DK).float() for rows_VD in chunks])
    return FittedPicker(tokens_VK, means_TK.float(), {task: names[task] for task in by_task}, radius, backend)


def discriminant(conditions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(D, D x K) the mean of the tasks' means, and the directions in which tasks differ, in units in which instructions
    of one task (N x D each, fp64) differ alike in each.

    Fisher's, with the covariance within tasks shrunk towards a share of the whole variance, in which a task with a
    single instruction has a place too.
    """
    means_TD = torch.stack([own_ND.mean(dim=0) for own_ND in conditions])
    center_D, width = means_TD.mean(dim=0), means_TD.shape[1]
    variance = torch.cat(list(conditions)).var(dim=0, correction=0).mean().clamp(min=1e-12)
    covariance_DD = SHRINKAGE * variance * torch.eye(width, dtype=torch.float64)
    for own_ND, mean_D in zip(conditions, means_TD, strict=True):
        rest_ND = own_ND - mean_D
        covariance_DD += (1 - SHRINKAGE) / len(conditions) * rest_ND.T @ rest_ND / len(rest_ND)
    lower_DD = torch.linalg.cholesky(covariance_DD)
    whitened_DT = torch.linalg.solve_triangular(lower_DD, (means_TD - center_D).T, upper=False)
    directions_DK = torch.linalg.svd(whitened_DT, full_matrices=False)[0][:, : len(conditions) - 1]
    return center_D, torch.linalg.solve_triangular(lower_DD.T, directions_DK, upper=True)


def _instructions(rows: Dataset, tasks: Iterable[str]) -> dict[str, list[str]]:
    """The different questions of each task, in the first of its rows; tasks that have some, sorted."""
    columns = [name for name in ("turns", "task", "tasks") if name in rows.column_names]
    positions, by_task = indices_by_answer(rows), dict[str, list[str]]()
    for task in sorted(positions.keys() & set(tasks)):
        own = records(rows.select(positions[task][:SAMPLES]).select_columns(columns))
        asked = (question for row in own for label, question in questions_of(row) if label == task)
        by_task[task] = list(dict.fromkeys(question for question in asked if question))
    return {task: own for task, own in by_task.items() if own}


def questions_of(row: Conversation) -> Iterator[tuple[str, str]]:
    """(task, question) of every answer of a row that has a task of its own; of the last one where they have none."""
    asked = [
        words(before["text"])
        for before, turn in zip(row["turns"], row["turns"][1:], strict=False)
        if turn["role"] == "assistant"
    ]
    tasks = row.get("tasks") or [row["task"]]
    yield from zip(reversed(tasks), reversed(asked), strict=False)


def _names(job: Job, live: Sequence[Live]) -> dict[str, str]:
    """The exports' names of tasks that have one of their own, now or already."""
    made = {task for one in live if len(one.target.shares) == 1 for task in one.target.shares}
    exports = job.folder / FOLDER
    return {
        task: name
        for task, name in folder_names(tasks_of(job.folder, lambda: job.training_rows)).items()
        if task in made or any((exports / f"{name}-{form}" / FIDELITY).is_file() for form in get_args(Form))
    }
