"""Routing statistics: the mean mixing matrix of every task in every layer (`C_t`), over all samples that went through.

Shapes: B batch, L adapted layers, T tasks, E = F factors in a pool, N looks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qmixlora.backbone.hidden_states import run_body
from qmixlora.evaluation.answers import evaluating, on_device
from qmixlora.session import Session

from . import MixLoraLayer, device_of

FILE = "routing.safetensors"
SUMS = "routing_sums.safetensors"  # in a checkpoint: what is counted since the last look


def mixture_layers(model: PeftModel) -> dict[str, nn.Module]:
    """The adapted layers of a MixLoRA model by their path in the backbone, in the order of the model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, MixLoraLayer)
    }


class RoutingStatistics:
    """Sums of the mixing matrices that samples were given, by task: exact, in fp64, two operations per batch.

    A sample counts once, however its batch is cut for accumulation and whatever checkpointing computes again: what is
    counted is the model's own forward pass. `task_mix` does not show, since each sample counts with its own selection.
    """

    def __init__(self, model: PeftModel, tasks: Sequence[str]) -> None:
        self.model, self.tasks = model, list(tasks)
        self.layers = mixture_layers(model)
        factors = model.peft_config[model.active_adapter].num_factors
        place: dict[str, Any] = {"dtype": torch.float64, "device": device_of(model)}
        self.sum_LTEF = torch.zeros(len(self.layers), len(self.tasks), factors, factors, **place)
        self.count_T = torch.zeros(len(self.tasks), **place)

    def mixes(self) -> Tensor:
        """The selections of the batch that was last in the model (L x B x E x F, fp32)."""
        found = self.model.base_model.mixlora_routing.current.mixes
        return torch.stack([found[layer, self.model.active_adapter] for layer in self.layers.values()])

    def add(self, tasks: Sequence[str]) -> None:
        """Count the batch that was last in the model; `tasks` are its B labels."""
        ids_B = torch.tensor([self.tasks.index(task) for task in tasks], device=self.count_T.device)
        self.sum_LTEF.index_add_(1, ids_B, self.mixes().to(self.sum_LTEF.dtype))
        self.count_T.index_add_(0, ids_B, torch.ones_like(ids_B, dtype=self.count_T.dtype))

    def watch(self) -> RemovableHandle:
        """Count every training forward pass from now on, until the handle's `remove()`."""

        def count(model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if model.training:
                self.add(kwargs["tasks"])

        handle: RemovableHandle = self.model.register_forward_hook(count, with_kwargs=True)
        return handle

    def take(self) -> tuple[dict[str, Tensor], Tensor]:
        """(means by layer: T x E x F fp32, counts: T, on the CPU) over all processes; counting starts anew.

        The mean of a task without samples is zero.
        """
        sum_LTEF, count_T = self._over_processes()
        self.sum_LTEF.zero_()
        self.count_T.zero_()
        mean_LTEF = (sum_LTEF / count_T.clamp(min=1)[:, None, None]).float().cpu()
        return dict(zip(self.layers, mean_LTEF, strict=True)), count_T.cpu()

    def save(self, checkpoint: Path) -> None:
        """Put what all processes have counted since `take` into a checkpoint folder; every process must call this."""
        sum_LTEF, count_T = self._over_processes()
        if self._rank() == 0:
            save_file({"sum": sum_LTEF.cpu(), "count": count_T.cpu()}, checkpoint / SUMS)

    def load(self, checkpoint: Path) -> None:
        """Go on counting from what `save` wrote."""
        if self._rank() == 0 and (checkpoint / SUMS).is_file():
            saved = load_file(checkpoint / SUMS)
            self.sum_LTEF.copy_(saved["sum"])
            self.count_T.copy_(saved["count"])

    def _over_processes(self) -> tuple[Tensor, Tensor]:
        sums = self.sum_LTEF.clone(), self.count_T.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for tensor in sums:
                torch.distributed.all_reduce(tensor)
        return sums

    def _rank(self) -> int:
        ready = torch.distributed.is_available() and torch.distributed.is_initialized()
        return torch.distributed.get_rank() if ready else 0


def calibrate(
    session: Session,
    rows: Sequence[Mapping[str, Any]],
    tasks: Sequence[str],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Tensor], Tensor]:
    """`C_t` from one pass over samples, which the run need not have seen: (means by layer: T x E x F, counts: T).

    `tasks` are the T labels among the rows.
    """
    statistics = RoutingStatistics(session.model, tasks)
    for done, batch in forward_passes(session, rows):
        statistics.add([row["task"] for row in batch])
        on_progress(done, len(rows))
    return statistics.take()


def forward_passes(session: Session, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Send the rows through the model in evaluation mode, no logits but one; yields (done, rows of the batch)."""
    model, size = session.model, session.recipe.train.eval_batch_size
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(rows), size):
            batch = [rows[index] for index in range(start, min(start + size, len(rows)))]
            inputs = on_device(session.collator(batch), device_of(model))
            inputs.pop("labels")
            run_body(model, inputs)
            yield start + len(batch), batch


class RoutingRecord:
    """`routing.safetensors`: over training, N looks at all samples since the look before.

    `steps` (N)   the steps of the looks
    `LAYER.mean` (T x E x F)   `C_t`: the mean mixing matrix of each task at the last look that saw the task
    `count` (T)   the number of samples in it
    `LAYER.usage_A`, `LAYER.usage_B` (N x T x E)   the share of a task's gate weight that each factor had at each look

    with the lists of `tasks` and `layers`, in the order of the model, as JSON in the file's metadata. A task that a
    look did not see stands as at the look before (evenly before the first).
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = list(tasks)
        self.steps: list[int] = []
        self.usage: dict[str, list[Tensor]] = {}
        self.means: dict[str, Tensor] = {}
        self.count_T = torch.zeros(len(self.tasks), dtype=torch.float64)

    def add(self, step: int, means: Mapping[str, Tensor], count_T: Tensor) -> None:
        """Append a look."""
        seen_T = count_T > 0
        self.steps.append(step)
        self.count_T = torch.where(seen_T, count_T, self.count_T)
        for layer, mean_TEF in means.items():
            before_TEF = self.means.get(layer, torch.zeros_like(mean_TEF))
            self.means[layer] = torch.where(seen_T[:, None, None], mean_TEF, before_TEF)
            for pool, share_TE in (("A", mean_TEF.sum(dim=2)), ("B", mean_TEF.sum(dim=1))):
                looks = self.usage.setdefault(f"{layer}.usage_{pool}", [])
                before_TE = looks[-1] if looks else torch.full_like(share_TE, 1 / share_TE.shape[1])
                usage_TE = share_TE / share_TE.sum(dim=1, keepdim=True)
                looks.append(torch.where(seen_T[:, None], usage_TE, before_TE))

    def save(self, folder: Path) -> None:
        """Write the record into a folder (beside, then renamed)."""
        tensors = {key: torch.stack(looks) for key, looks in self.usage.items()}
        tensors |= {f"{layer}.mean": mean_TEF.contiguous() for layer, mean_TEF in self.means.items()}
        tensors |= {"steps": torch.tensor(self.steps), "count": self.count_T}
        temporary = folder / (FILE + ".tmp")
        save_file(tensors, temporary, {"tasks": json.dumps(self.tasks), "layers": json.dumps(list(self.means))})
        temporary.replace(folder / FILE)

    def load(self, folder: Path) -> None:
        """Take up the record that a folder holds, if it holds one."""
        if not (folder / FILE).is_file():
            return
        with safe_open(folder / FILE, "pt") as file:
            layers = json.loads(file.metadata()["layers"])
            self.steps = file.get_tensor("steps").tolist()
            self.count_T = file.get_tensor("count")
            self.means = {layer: file.get_tensor(f"{layer}.mean") for layer in layers}
            usage = [f"{layer}.usage_{pool}" for layer in layers for pool in "AB"]
            self.usage = {key: list(file.get_tensor(key)) for key in usage}
