"""What to export: which tasks, mixed how, under which folder names, and where their mixing matrices come from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from qmixlora.data import load_conversations
from qmixlora.errors import UserError
from qmixlora.evaluation.answers import indices_by_task
from qmixlora.mixlora.routing_record import FILE, calibrate
from qmixlora.session import Session

from .fidelity import FIDELITY
from .merge import Base
from .static import Learned

Form = Literal["lora", "merged"]
CALIBRATED = 512  # samples per task that a calibration pass looks at


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    `tasks` as on the command line (`T`, or `T=0.7`), empty for all of the run; `together` makes one adapter of them.
    `rank` cuts the updates; `polish` is the number of further steps (None: the recipe's, where a mean lost something);
    `calibration` a file of samples to take the routing from; `projector_rank` writes the projector as low-rank
    factors; `samples` limits the held-out rows measured per task (None: the recipe's).
    """

    tasks: tuple[str, ...] = ()
    forms: tuple[Form, ...] = ("lora",)
    together: bool = False
    base: Base = "nf4"
    rank: int | None = None
    polish: int | None = None
    calibration: str | None = None
    projector_rank: int | None = None
    samples: int | None = None


@dataclass(frozen=True)
class Plan:
    """One export: the shares of the tasks in it (they sum to 1), and the name of its folders."""

    name: str
    shares: dict[str, float]

    def mix(self, means: Mapping[str, Tensor]) -> Tensor:
        """`sum_t share_t C_t` in every layer (L x E x F)."""
        return torch.stack([share * means[task] for task, share in self.shares.items()]).sum(dim=0)


def make_plans(request: Request, known: Sequence[str]) -> list[Plan]:
    """The exports that are asked for. Raises UserError for unknown tasks, bad weights, or names that collide."""
    weights: dict[str, float] = {}
    weighted = False
    for text in request.tasks or tuple(known):
        task, weight = _task_and_weight(text, known)
        weighted = weighted or weight is not None
        weights[task] = 1.0 if weight is None else weight
    if request.together or weighted:
        total = sum(weights.values())
        name = "all" if set(weights) == set(known) and len(known) > 1 else "+".join(map(safe_name, weights))
        return [Plan(name, {task: weight / total for task, weight in weights.items()})]
    plans = [Plan(safe_name(task), {task: 1.0}) for task in weights]
    names = [plan.name for plan in plans]
    if clash := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"Several tasks would be written to {clash[0]}.", where="--task", fix="Export them one by one.")
    return plans


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


def safe_name(task: str) -> str:
    """A task's name as a folder's: letters, digits, `.`, `_`, `+`, `-` stay, the rest becomes `_`."""
    return re.sub(r"[^\w.+-]|^\.+", "_", task, flags=re.ASCII) or "_"


def tasks_of(folder: Path, training_rows: Callable[[], Any]) -> list[str]:
    """The tasks of a run: those in its routing record, else those in its training data."""
    if (folder / FILE).is_file():
        with safe_open(folder / FILE, "pt") as file:
            tasks: list[str] = json.loads(file.metadata()["tasks"])
            return tasks
    return list(indices_by_task(training_rows()))


def exported_tasks(folder: Path) -> list[str]:
    """The tasks that an export was made for; none for a folder that is no export."""
    if not (folder / FIDELITY).is_file():
        return []
    return list(json.loads((folder / FIDELITY).read_text(encoding="utf-8"))["tasks"])


def mixes_by_task(
    session: Session,
    run: Learned,
    folder: Path,
    request: Request,
    tasks: Sequence[str],
    training_rows: Callable[[], Any],
) -> dict[str, Tensor]:
    """`C_t` of every task (L x E x F each).

    Taken from the run's own record; from a pass over `request.calibration` if that is given; for tasks of which the
    record has no sample, from a pass over their training rows. The samples of a calibration file count for the task
    that they name, all of them for a single task. An adapter that routes on the task gives all its samples the same
    matrix: one row tells it exactly, and as it is at the end.

    Raises:
        UserError: a calibration file without samples of a task.
    """
    if not run.is_mixture:
        return dict.fromkeys(tasks, run.identity())
    found: dict[str, Tensor] = {}
    by_label = session.recipe.adapter.route_on == "task"
    if request.calibration is None and not by_label and (folder / FILE).is_file():
        with safe_open(folder / FILE, "pt") as file:
            known = json.loads(file.metadata()["tasks"])
            mean_LTEF = torch.stack([file.get_tensor(f"{layer}.mean") for layer in run.pools])
            counts = dict(zip(known, file.get_tensor("count").tolist(), strict=True))
            found = {task: mean_LTEF[:, known.index(task)] for task in tasks if counts.get(task, 0) > 0}
    left = [task for task in tasks if task not in found]
    if left:
        given, field = request.calibration, session.recipe.data.task_field
        rows = load_conversations(given, task_field=field) if given else training_rows()
        by_task = indices_by_task(rows)
        if given and len(tasks) == 1:
            by_task.setdefault(tasks[0], list(range(len(rows))))
        if lacking := [task for task in left if task not in by_task]:
            raise UserError(f"There is no sample of {lacking[0]!r} to calibrate on.", where=given or "data.train")
        for task in left:
            chosen = [{**rows[index], "task": task} for index in by_task[task][: 1 if by_label else CALIBRATED]]
            means, _ = calibrate(session, chosen, [task])
            found[task] = torch.cat(list(means.values()))
    return found
