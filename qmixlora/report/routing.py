"""Routing of a run in numbers: which factors its tasks use, how alike the tasks are, how the routers moved.

Shapes: L layers, N snapshots over training, T tasks, E = F factors in a pool.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qmixlora.errors import UserError
from qmixlora.files import clear_read_errors
from qmixlora.manifest import check_unchanged
from qmixlora.mixlora.routing_record import FILE, usage_entropy

DEAD = 0.1  # a factor is dead if no task gives it a tenth of an even share of its gates


@dataclass(frozen=True)
class RoutingSummary:
    """The routing record of a run. `usage_A_LNTE`, `usage_B_LNTE`: the share of a task's gates that a factor had in a
    snapshot; `mean_LTEF`: C_t at the end; `steps` (N): those of the snapshots; `unseen`: tasks of the run of which no
    sample was seen, and which are none of the T: their even usage and their mean of zero were not measured.
    """

    tasks: list[str]
    layers: list[str]
    steps: list[int]
    usage_A_LNTE: Tensor
    usage_B_LNTE: Tensor
    mean_LTEF: Tensor
    unseen: Sequence[str] = ()

    def of_tasks(self, indices: Sequence[int]) -> RoutingSummary:
        """The same of some tasks alone; itself for all of them."""
        if len(indices) == len(self.tasks):
            return self
        of = list(indices)
        usage_A_LNTE, usage_B_LNTE = self.usage_A_LNTE[:, :, of], self.usage_B_LNTE[:, :, of]
        return replace(
            self,
            tasks=[self.tasks[index] for index in of],
            usage_A_LNTE=usage_A_LNTE,
            usage_B_LNTE=usage_B_LNTE,
            mean_LTEF=self.mean_LTEF[:, of],
        )

    def entropy(self) -> Tensor:
        """The evenness of a task's usage of pool A in a layer (L x T): 0 one factor, 1 all alike."""
        return usage_entropy(self.usage_A_LNTE[:, -1])

    def dead(self) -> Tensor:
        """Whether factors of pools A and B are used by no task (2 x L x E)."""
        last_PLTE = torch.stack([self.usage_A_LNTE[:, -1], self.usage_B_LNTE[:, -1]])
        return last_PLTE.amax(dim=2) < DEAD / last_PLTE.shape[3]

    def similarity(self) -> Tensor:
        """Cosine of the tasks' mean mixing matrices, averaged over layers (T x T)."""
        flat_LTM = torch.nn.functional.normalize(self.mean_LTEF.flatten(2), dim=2)
        return (flat_LTM @ flat_LTM.transpose(1, 2)).mean(dim=0)

    def drift(self) -> Tensor:
        """The movement of pool A's usage between snapshots (N - 1): total variation, 0 not at all, 1 entirely."""
        moved_LNTE = self.usage_A_LNTE[:, 1:] - self.usage_A_LNTE[:, :-1]
        return moved_LNTE.abs().sum(dim=3).mean(dim=(0, 2)) / 2

    def to_dict(self) -> dict[str, Any]:
        """The summary in the JSON of `qmixlora inspect RUN --routing`."""
        similarity_TT, entropy_T, dead_PLE = self.similarity(), self.entropy().mean(dim=0), self.dead()
        factors = dead_PLE.shape[2]
        return {
            "factors": factors,
            "layers": len(self.layers),
            "dead_factors": {
                "A": int(dead_PLE[0].sum()),
                "B": int(dead_PLE[1].sum()),
                "of": len(self.layers) * factors,
            },
            "tasks": {
                task: {
                    "entropy": float(entropy_T[index]),
                    "similarity": dict(zip(self.tasks, similarity_TT[index].tolist(), strict=True)),
                }
                for index, task in enumerate(self.tasks)
            },
            "unseen_tasks": list(self.unseen),
            "drift": [
                {"step": step, "moved": moved}
                for step, moved in zip(self.steps[1:], self.drift().tolist(), strict=True)
            ],
        }


def read_routing(folder: Path) -> RoutingSummary:
    """The routing record of a run folder. Raises UserError if the run has none, or a damaged one."""
    summary = routing_of(folder)
    if summary is None:
        raise UserError(
            "This run has no record of its routing.",
            where=str(folder / FILE),
            fix="Only runs of adapter.method 'mixlora' have one; train one with `qmixlora train`.",
        )
    return summary


def routing_of(folder: Path) -> RoutingSummary | None:
    """The same; None for a run that has no record, or one that has seen nothing. Raises UserError if it is damaged."""
    path = folder / FILE
    if not path.is_file():
        return None
    check_unchanged(folder, [FILE], "The record of the routing")
    with clear_read_errors(path, "Take a whole copy of the run's folder."), safe_open(path, "pt") as file:
        tasks, layers = (json.loads(file.metadata()[name]) for name in ("tasks", "layers"))
        if not layers:
            return None
        usage_A, usage_B, mean = (
            torch.stack([file.get_tensor(f"{layer}.{kind}") for layer in layers])
            for kind in ("usage_A", "usage_B", "mean")
        )
        counts = file.get_tensor("count").tolist()
        summary = RoutingSummary(tasks, layers, file.get_tensor("steps").tolist(), usage_A, usage_B, mean)
    seen = [index for index, count in enumerate(counts) if count]
    unseen = [task for task, count in zip(tasks, counts, strict=True) if not count]
    return replace(summary.of_tasks(seen), unseen=unseen) if seen else None
