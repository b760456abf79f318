"""How a run routes: the mean mixing matrix of every task in every layer, looked at on the same samples over and over.

Shapes: B batch, T tasks, E = F factors in a pool, N looks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .evaluation import evaluating, indices_by_task, on_device
from .loss import takes_logits_to_keep
from .mixlora import MixLoraLayer
from .session import Session

PER_TASK, LIMIT = 16, 512  # samples looked at: of each task, and in all
FILE = "routing.safetensors"


class RoutingProbe:
    """Looks at how a MixLoRA model routes a fixed choice of samples, the first ones of every task.

    `tasks` are the sorted labels (T) of the rows; `layers` the adapted layers by their name in the backbone.
    """

    def __init__(self, session: Session, rows: Any) -> None:
        self.session = session
        by_task = indices_by_task(rows)
        self.tasks = list(by_task)
        share = max(1, min(PER_TASK, LIMIT // len(self.tasks)))
        self.rows = [(number, rows[i]) for number, task in enumerate(self.tasks) for i in by_task[task][:share]]
        self.layers = {
            name.removeprefix("base_model.model."): module
            for name, module in session.model.named_modules()
            if isinstance(module, MixLoraLayer)
        }

    def look(self) -> dict[str, Tensor]:
        """Every layer's mean mix per task (T x E x F, on the CPU): what is called C_t where it is exported."""
        model, adapter = self.session.model, self.session.model.active_adapter
        size = self.session.recipe.train.eval_batch_size
        sums: dict[str, Tensor] = {}
        counts_T = torch.zeros(len(self.tasks))
        with torch.no_grad(), evaluating(model):
            for start in range(0, len(self.rows), size):
                numbers, rows = zip(*self.rows[start : start + size], strict=True)
                inputs = on_device(self.session.collator(rows), model.device)
                inputs.pop("labels")
                model(**inputs, use_cache=False, **({"logits_to_keep": 1} if takes_logits_to_keep(model) else {}))
                ids_B = torch.tensor(numbers)
                counts_T.index_add_(0, ids_B, torch.ones(len(ids_B)))
                mixes = model.base_model.mixlora_routing.current.mixes
                for name, layer in self.layers.items():
                    mix_BEF = mixes[layer, adapter].cpu()
                    if name not in sums:
                        sums[name] = mix_BEF.new_zeros(len(self.tasks), *mix_BEF.shape[1:])
                    sums[name].index_add_(0, ids_B, mix_BEF)
        return {name: total / counts_T[:, None, None] for name, total in sums.items()}


class RoutingRecord:
    """`routing.safetensors`: `steps` (N) and, for every layer,

    `LAYER.mean` (T x E x F)   the mean mix of each task at the last look
    `LAYER.usage_A`, `LAYER.usage_B` (N x T x E)   the share of a task's gate weight that each factor had at each look

    with the lists of `tasks` and `layers`, in the order of the model, as JSON in the file's metadata.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: list[int] = []
        self.usage: dict[str, list[Tensor]] = {}

    def resume(self, until_step: int) -> None:
        """Take up an earlier record, without what came after the step that the run resumes from."""
        if not self.path.is_file():
            return
        with safe_open(self.path, "pt") as file:
            steps = file.get_tensor("steps").tolist()
            kept = [index for index, step in enumerate(steps) if step <= until_step]
            self.steps = [steps[index] for index in kept]
            keys = [key for key in file.keys() if ".usage_" in key]  # noqa: SIM118
            self.usage = {key: list(file.get_tensor(key)[kept]) for key in keys}

    def add(self, step: int, tasks: list[str], means: dict[str, Tensor]) -> None:
        """Append a look and write the file (beside, then renamed)."""
        self.steps.append(step)
        for layer, mean_TEF in means.items():
            for pool, share_TE in (("A", mean_TEF.sum(dim=2)), ("B", mean_TEF.sum(dim=1))):
                usage_TE = share_TE / share_TE.sum(dim=1, keepdim=True)
                self.usage.setdefault(f"{layer}.usage_{pool}", []).append(usage_TE)
        tensors = {key: torch.stack(looks) for key, looks in self.usage.items()}
        tensors |= {f"{layer}.mean": mean_TEF.contiguous() for layer, mean_TEF in means.items()}
        temporary = self.path.with_name(self.path.name + ".tmp")
        names = {"tasks": json.dumps(tasks), "layers": json.dumps(list(means))}
        save_file({**tensors, "steps": torch.tensor(self.steps)}, temporary, metadata=names)
        temporary.replace(self.path)
