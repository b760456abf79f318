"""Task interference: the paper's measure of how much tasks disturb each other, from gradients of a trained run.

Shapes: T tasks, N batches per task; T x N gradients of one pool in one layer are rows of a matrix.

Paper (arXiv 2402.15896, task interference): a step of length lr along task j's gradient changes task i's loss by
`D_j L_i(x) ~ lr * E[(g_j / ||g_j||)^T g_i(x)]`, and `I_ij = E_x[D_j L_i(x) / D_i L_i(x)]`. One on the diagonal;
positive where a step for j also helps i, negative where it harms i. The learning rate cancels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from qmixlora.data import IGNORED, Conversation, indices_by_answer
from qmixlora.errors import UserError
from qmixlora.loss import supervised_loss
from qmixlora.mixlora import PEFT_PREFIX
from qmixlora.session import Session

POOLS = ("A", "B")
POOL = re.compile(r"^(?P<layer>.+)\.(?:mix)?lora_(?P<pool>[AB])\.")


@dataclass(frozen=True)
class Interference:
    """`matrices[layer, pool]` is I (T x T, task i in rows, disturbing task j in columns) for pool `A` or `B`."""

    tasks: list[str]
    matrices: dict[tuple[str, str], Tensor]

    def mean(self, pool: str) -> Tensor:
        """I (T x T) averaged over the layers; layers where a task's own step would not lower its loss are left out."""
        stacked_LTT = torch.stack([matrix for (_, kind), matrix in self.matrices.items() if kind == pool])
        return stacked_LTT.nanmean(dim=0)

    def conflicts(self, count: int) -> list[tuple[str, str, str, float]]:
        """The most negative entries of the means: (pool, disturbing task, disturbed task, I), worst first."""
        negative = [
            (pool, self.tasks[j], self.tasks[i], value)
            for pool in POOLS
            for i, row in enumerate(self.mean(pool).tolist())
            for j, value in enumerate(row)
            if i != j and value < 0
        ]
        return sorted(negative, key=lambda conflict: conflict[-1])[:count]

    def to_dict(self) -> dict[str, Any]:
        """The contents of `interference.json`: `mean` per pool, and `layers`; each T x T, as rows (null: no ratio)."""
        means = {pool: _rows(self.mean(pool)) for pool in POOLS}
        layers: dict[str, dict[str, Any]] = {}
        for (layer, pool), matrix_TT in self.matrices.items():
            layers.setdefault(layer, {})[pool] = _rows(matrix_TT)
        return {"tasks": self.tasks, "mean": means, "layers": layers}


def _rows(matrix_TT: Tensor) -> list[list[float | None]]:
    return [[None if value != value else round(value, 4) for value in row] for row in matrix_TT.tolist()]


def interference_matrix(gradients_TNP: Tensor) -> Tensor:
    """I (T x T) of one set of P parameters, from gradients on N batches of each of T tasks.

    `I[i, j]` is the mean over i's batches of `D_j L_i(x) / D_i L_i(x)`. NaN in the row of a task whose own steps do not
    lower its loss to first order (`D_i L_i` not positive), where the ratio means nothing.
    """
    unit_TP = nn.functional.normalize(gradients_TNP, dim=2).mean(dim=1)  # E[g_j / ||g_j||]
    change_TNT = gradients_TNP @ unit_TP.T  # D_j L_i(x) / lr: task i, its batch, disturbing task j
    own_TN = torch.diagonal(change_TNT, dim1=0, dim2=2).T
    ratio_TNT = change_TNT / torch.where(own_TN > 0, own_TN, torch.nan)[..., None]
    return ratio_TNT.nanmean(dim=1)


def measure_interference(
    session: Session,
    rows: Dataset,
    *,
    batches: int = 4,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Interference:
    """Task interference of a run's adapter (MixLoRA or LoRA), per layer, for the A and B factors apart.

    Gradients are those of the training loss on `batches` batches of each task (its answers alone, where a conversation
    has several tasks), without dropout, and are held on the CPU: tasks x batches x factor parameters x 4 bytes. The
    model is left as it was.

    Raises:
        UserError: a model without an adapter, fewer than two tasks, or a task with fewer samples than batches.
    """
    parameters = _factors(session)
    if not parameters:
        raise UserError(
            "Interference is measured in an adapter, and this model has none.",
            where=session.recipe.model.id,
            fix="Name the folder of a run.",
        )
    by_task = indices_by_answer(rows)
    tasks = list(by_task)
    if len(tasks) < 2:
        raise UserError("Interference is between tasks, and the data has only one.", where=", ".join(tasks))
    short = [task for task in tasks if len(by_task[task]) < batches]
    if short:
        raise UserError(
            f"Too few samples for {batches} batches per task.", where=", ".join(short), fix="Use a larger --split."
        )
    gradients: dict[tuple[str, str], list[Tensor]] = {key: [] for key in parameters}
    with session.evaluating():
        for number, task in enumerate(tasks):
            for index in range(batches):
                chosen = by_task[task][index::batches][:batch_size]
                of_batch = _gradients(session, [rows[i] for i in chosen], task, parameters)
                for key, gradient in of_batch.items():
                    gradients[key].append(gradient)
                on_progress(number * batches + index + 1, len(tasks) * batches)
    shape = (len(tasks), batches, -1)
    return Interference(tasks, {key: interference_matrix(torch.stack(g).view(shape)) for key, g in gradients.items()})


def _factors(session: Session) -> dict[tuple[str, str], nn.Parameter]:
    """The factor parameters of the language model by (layer, pool). (A projector's see no text, and no batch without
    images.)
    """
    named = session.model.named_parameters()
    matches = ((POOL.match(name.removeprefix(PEFT_PREFIX)), parameter) for name, parameter in named)
    factors = {(match["layer"], match["pool"]): parameter for match, parameter in matches if match}
    return {key: value for key, value in factors.items() if key[0] not in session.anatomy.projector_targets}


def _gradients(
    session: Session, rows: Sequence[Conversation], task: str, parameters: Mapping[tuple[str, str], nn.Parameter]
) -> dict[tuple[str, str], Tensor]:
    """Gradients of the loss on the rows' answers of one task."""
    batch = session.collator(rows)
    for labels_S, segments_S, tasks in zip(batch["labels"], batch["segments"], batch["tasks"], strict=True):
        for number, own in enumerate(() if isinstance(tasks, str) else tasks):
            if own != task:
                labels_S[segments_S == number] = IGNORED
    loss = supervised_loss(session.model, session.on_device(batch))
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return {key: g.float().flatten().cpu() for key, g in zip(parameters, gradients, strict=True)}
