"""The routing record: the mean mixing matrix of every task in every layer (`C_t`), over all its instances.

Shapes: B batch, N instances in it, L adapted layers, T tasks, E = F factors in a pool, X snapshots.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .config import PEFT_PREFIX, MixLoraConfig
from .inputs import to_device
from .layer import MixLoraLayer
from .model import MixLoraModel
from .routing import device_of
from .segments import Tasks

FILE = "routing.safetensors"
SUMS = "routing_sums.safetensors"  # in a checkpoint: the sums since the last snapshot


def mixture_layers(model: PeftModel) -> list[str]:
    """The paths of a MixLoRA model's adapted layers in the backbone, in the order of the model."""
    return [
        name.removeprefix(PEFT_PREFIX) for name, module in model.named_modules() if isinstance(module, MixLoraLayer)
    ]


class RoutingStatistics:
    """Sums the mixing matrices that instances (each segment of a sample) were given, by task: exact, in fp64, a few
    operations per batch.

    An instance counts once, however its batch is cut for accumulation and whatever checkpointing computes again, since
    the model's own forward pass is counted. `task_mix` does not show: each counts with its own selection.
    """

    def __init__(self, model: PeftModel, tasks: Sequence[str]) -> None:
        self.model, self.tasks = model, list(tasks)
        self.ids = {task: index for index, task in enumerate(self.tasks)}
        self.tuner = cast(MixLoraModel, model.base_model)
        self.layers = mixture_layers(model)
        factors = cast(MixLoraConfig, model.active_peft_config).num_factors
        fp64: dict[str, Any] = {"dtype": torch.float64, "device": device_of(model)}
        self.sum_LTEF = torch.zeros(len(self.layers), len(self.tasks), factors, factors, **fp64)
        self.count_T = torch.zeros(len(self.tasks), **fp64)

    def add(self, tasks: Tasks) -> None:
        """Count the batch that was last in the model; `tasks` are the labels of its B samples (of a sample with several
        tasks: a list of one for each of its segments). Instances of other tasks do not count: in a conversation, those
        of answers that are shown and not learned.
        """
        labels, device = self.tuner.last_labels(tasks), self.count_T.device
        places_N = to_device([place for place, task in enumerate(labels) if task in self.ids], device)
        ids_N = to_device([self.ids[task] for task in labels if task in self.ids], device)
        own_LNEF = self.tuner.last_selection().index_select(1, places_N)
        self.sum_LTEF.index_add_(1, ids_N, own_LNEF.to(self.sum_LTEF.dtype))
        self.count_T.index_add_(0, ids_N, torch.ones_like(ids_N, dtype=self.count_T.dtype))

    def watch(self) -> RemovableHandle:
        """Count every training forward pass from now on, until the handle's `remove()`."""

        def count(model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if model.training:
                self.add(kwargs["tasks"])

        handle: RemovableHandle = self.model.register_forward_hook(count, with_kwargs=True)
        return handle

    def take(self) -> tuple[dict[str, Tensor], Tensor]:
        """Return (means by layer: T x E x F fp32, counts: T, on the CPU) over all processes, and count anew.

        The mean of a task without samples is zero.
        """
        sum_LTEF, count_T = self._over_processes()
        count_T = count_T.to("cpu", copy=True)
        seen_T = count_T.nonzero()[:, 0].to(sum_LTEF.device)  # most of many tasks are in no snapshot: theirs are zero
        mean_LTEF = torch.zeros(sum_LTEF.shape)
        seen_LTEF = sum_LTEF.index_select(1, seen_T) / count_T[count_T > 0].to(sum_LTEF.device)[:, None, None]
        mean_LTEF.index_copy_(1, seen_T.cpu(), seen_LTEF.float().cpu())
        self.sum_LTEF.index_fill_(1, seen_T, 0)
        self.count_T.zero_()
        return dict(zip(self.layers, mean_LTEF, strict=True)), count_T

    def save(self, checkpoint: Path) -> None:
        """Put the sums of all processes since `take` into a checkpoint folder; every process must call this."""
        sum_LTEF, count_T = self._over_processes()
        if self._rank() == 0:
            save_file({"sum": sum_LTEF.cpu(), "count": count_T.cpu()}, checkpoint / SUMS)

    def load(self, checkpoint: Path) -> None:
        """Go on counting from the sums that `save` wrote."""
        if self._rank() == 0 and (checkpoint / SUMS).is_file():
            saved = load_file(checkpoint / SUMS)
            self.sum_LTEF.copy_(saved["sum"])
            self.count_T.copy_(saved["count"])

    def _over_processes(self) -> tuple[Tensor, Tensor]:
        """The sums of all processes; of one alone its own."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.sum_LTEF, self.count_T
        sums = self.sum_LTEF.clone(), self.count_T.clone()
        for tensor in sums:
            torch.distributed.all_reduce(tensor)
        return sums

    def _rank(self) -> int:
        ready = torch.distributed.is_available() and torch.distributed.is_initialized()
        return torch.distributed.get_rank() if ready else 0


def usage_entropy(usage_LTE: Tensor) -> Tensor:
    """The evenness of a task's usage of a pool in a layer (L x T): 0 one factor, 1 all alike."""
    entropy_LT = -(usage_LTE * usage_LTE.clamp(min=1e-12).log()).sum(dim=2)
    return entropy_LT / torch.tensor(float(usage_LTE.shape[2])).log().clamp(min=1e-12)


class RoutingRecord:
    """`routing.safetensors`: over training, X snapshots, each of all instances since the one before.

    `steps` (X)   the steps of the snapshots
    `LAYER.mean` (T x E x F)   `C_t`: the mean mixing matrix of each task in the last snapshot with some of it
    `count` (T)   the number of instances in it
    `LAYER.usage_A`, `LAYER.usage_B` (X x T x E)   the share of a task's gate weight that each factor had in each

    with the lists of `tasks` and `layers`, in the order of the model, as JSON in the file's metadata. A task without
    samples in a snapshot keeps its previous values (an even usage before the first).
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = list(tasks)
        self.steps: list[int] = []
        self.usage: dict[str, list[Tensor]] = {}
        self.means: dict[str, Tensor] = {}
        self.count_T = torch.zeros(len(self.tasks), dtype=torch.float64)

    def add(self, step: int, means: Mapping[str, Tensor], count_T: Tensor) -> None:
        """Append a snapshot."""
        seen_T = count_T > 0
        self.steps.append(step)
        self.count_T = torch.where(seen_T, count_T, self.count_T)
        for layer, mean_TEF in means.items():
            if layer not in self.means:
                self.means[layer] = torch.zeros_like(mean_TEF)
            own_NEF = mean_TEF[seen_T]  # of the tasks in the snapshot, which may be few of many
            self.means[layer][seen_T] = own_NEF
            for pool, share_NE in (("A", own_NEF.sum(dim=2)), ("B", own_NEF.sum(dim=1))):
                snapshots = self.usage.setdefault(f"{layer}.usage_{pool}", [])
                even_TE = mean_TEF.new_full(mean_TEF.shape[:2], 1 / mean_TEF.shape[1])
                usage_TE = snapshots[-1].clone() if snapshots else even_TE
                usage_TE[seen_T] = share_NE / share_NE.sum(dim=1, keepdim=True)
                snapshots.append(usage_TE)

    def entropy(self) -> float:
        """The mean entropy of the last usage of pool A (`usage_entropy`) by the tasks seen so far; NaN before them."""
        seen_T = self.count_T > 0  # the even usage of others was not measured
        last = [snapshots[-1][seen_T] for key, snapshots in self.usage.items() if key.endswith("usage_A")]
        return float(usage_entropy(torch.stack(last)).mean()) if last else float("nan")

    def save(self, path: Path) -> None:
        """Write the record to a file."""
        tensors = {key: torch.stack(snapshots) for key, snapshots in self.usage.items()}
        tensors |= {f"{layer}.mean": mean_TEF.contiguous() for layer, mean_TEF in self.means.items()}
        tensors |= {"steps": torch.tensor(self.steps), "count": self.count_T}
        save_file(tensors, path, {"tasks": json.dumps(self.tasks), "layers": json.dumps(list(self.means))})

    def load(self, folder: Path) -> None:
        """Continue the record that a folder holds, if it holds one."""
        if not (folder / FILE).is_file():
            return
        with safe_open(folder / FILE, "pt") as file:
            layers = json.loads(file.metadata()["layers"])
            self.steps = file.get_tensor("steps").tolist()
            self.count_T = file.get_tensor("count")
            self.means = {layer: file.get_tensor(f"{layer}.mean") for layer in layers}
            usage = [f"{layer}.usage_{pool}" for layer in layers for pool in "AB"]
            self.usage = {key: list(file.get_tensor(key)) for key in usage}
