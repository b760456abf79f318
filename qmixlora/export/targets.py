"""The targets of an export: which tasks, mixed how, under which folder names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset
from safetensors import safe_open
from torch import Tensor

from qmixlora.data import indices_by_task
from qmixlora.errors import UserError
from qmixlora.files import clear_read_errors
from qmixlora.manifest import check_unchanged
from qmixlora.mixlora.routing_record import FILE

from .fidelity import FIDELITY
from .merge import Base
from .names import folder_names, mixture_name

WHOLE_COPY = "Take a whole copy of the run's folder; or move the record away, and export with --calibration FILE."
Form = Literal["lora", "merged", "gguf", "live-gguf"]
Projector = Literal["base", "adapter", "low-rank"]


@dataclass(frozen=True)
class Request:
    """The wishes of the user.

    `tasks` as on the command line (`T`, or `T=0.7`), empty for all of the run; `together` makes one adapter of them.
    `rank` cuts the updates; `polish` is the number of further steps (None: the recipe's, where a mean lost something);
    `calibration` a file of samples to take the routing from; `projector` is where a trained projector of a LoRA goes,
    `projector_rank` its rank as low-rank factors (None: the adapter's); `samples` limits the held-out rows measured per
    task (None: the recipe's); `fingerprint` says whether one is made.
    """

    tasks: tuple[str, ...] = ()
    forms: tuple[Form, ...] = ("lora",)
    together: bool = False
    base: Base = "nf4"
    rank: int | None = None
    polish: int | None = None
    calibration: str | None = None
    projector: Projector = "base"
    projector_rank: int | None = None
    samples: int | None = None
    fingerprint: bool = True


@dataclass(frozen=True)
class Target:
    """One export: the shares of the tasks in it (they sum to 1), and the name of its folders."""

    name: str
    shares: dict[str, float]

    def mixing_matrix(self, means: Mapping[str, Tensor]) -> Tensor:
        """`sum_t share_t C_t` in every layer (L x E x F)."""
        return torch.stack([share * means[task] for task, share in self.shares.items()]).sum(dim=0)


def make_targets(request: Request, known: Sequence[str]) -> list[Target]:
    """The exports that are asked for. Raises UserError for unknown tasks and bad weights."""
    weights: dict[str, float] = {}
    weighted = False
    for text in request.tasks or tuple(known):
        task, weight = _task_and_weight(text, known)
        weighted = weighted or weight is not None
        weights[task] = 1.0 if weight is None else weight
    if request.together or weighted:
        total = sum(weights.values())
        shares = {task: weight / total for task, weight in weights.items()}
        return [Target(mixture_name(shares, known), shares)]
    names = folder_names(known)
    return [Target(names[task], {task: 1.0}) for task in weights]


def tasks_of(folder: Path, training_rows: Callable[[], Dataset]) -> list[str]:
    """The tasks of a run: those in its routing record, else those in its training data."""
    if (folder / FILE).is_file():
        check_unchanged(folder, [FILE], "The record of the routing")
        with clear_read_errors(folder / FILE, WHOLE_COPY), safe_open(folder / FILE, "pt") as file:
            tasks: list[str] = json.loads(file.metadata()["tasks"])
            return tasks
    return list(indices_by_task(training_rows()))


def exported_tasks(folder: Path) -> list[str]:
    """The tasks that an export was made for; none for a folder that is no export."""
    if not (folder / FIDELITY).is_file():
        return []
    check_unchanged(folder, [FIDELITY], "The fidelity of this export")
    with clear_read_errors(folder / FIDELITY, "Export again."):
        tasks = json.loads((folder / FIDELITY).read_text(encoding="utf-8"))["tasks"]
        return list({str(task): float(share) for task, share in tasks.items()})


def _task_and_weight(text: str, known: Sequence[str]) -> tuple[str, float | None]:
    if text in known:
        return text, None
    task, _, number = text.rpartition("=")
    if task not in known:
        raise UserError(f"The run has no task {task or text!r}.", where="--task", fix=f"Its tasks: {', '.join(known)}.")
    try:
        weight = float(number)
    except ValueError:
        weight = -1.0
    if not 0 < weight < float("inf"):
        raise UserError(f"{number!r} is no weight.", where=f"--task {text}", fix="Give a number over 0, as in a=0.7.")
    return task, weight
