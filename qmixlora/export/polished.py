"""Polished adapters that a run keeps: exports that are made in the same way polish each of them once.

`RUN/polished/NAME.safetensors` has the low-rank factors of a target's adapter, none where its mean was kept, and a
fingerprint of all that polishing depends on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qmixlora.adapter import ADAPTER_WEIGHTS
from qmixlora.data import fingerprint, indices_by_task
from qmixlora.files import replacing

from .job import Job
from .low_rank import LowRank
from .polish import START
from .targets import Target

FOLDER = "polished"
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Polished:
    """What came of polishing a mean: its low-rank updates after `steps` (none, after 0: the mean stands); the steps
    that were tried, and the rows that decided (None: nothing was to decide).
    """

    steps: int
    tried: int
    decided_on: str | None
    updates: Mapping[str, LowRank]


def fingerprint_of(job: Job, target: Target, mix_LEF: Tensor) -> str:
    """A digest of what polishing a target depends on: what the run learned, its recipe, the request, the mixing
    matrices, and the rows (as `fingerprint` tells them apart: of images it is names and the sizes of bytes).
    """
    request = job.request
    weights = (job.folder / "adapter" / ADAPTER_WEIGHTS).read_bytes()
    settings = {
        "run": hashlib.sha256(weights).hexdigest(),
        "recipe": job.recipe.model_dump(mode="json", exclude={"export": True, "train": {"output"}}),
        "steps": [job.polish_steps, request.polish is None, START],
        "form": [request.rank, request.projector, request.projector_rank],
        "tasks": target.shares,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(mix_LEF.contiguous().numpy().tobytes())
    for rows in (job.training_rows, job.validation_rows):
        by_task = {} if rows is None else indices_by_task(rows)
        for task in target.shares.keys() & by_task.keys():
            assert rows is not None, "it has tasks"
            digest.update(f"{task} {fingerprint(rows.select(by_task[task]))}".encode())
    return digest.hexdigest()


def keep(job: Job, target: Target, digest: str, polished: Polished) -> None:
    """Write a polished adapter into its place, where a later export finds it."""
    tensors = {f"{layer}{DOWN}": update.down_KI.contiguous() for layer, update in polished.updates.items()}
    tensors |= {f"{layer}{UP}": update.up_OK.contiguous() for layer, update in polished.updates.items()}
    told = {"steps": polished.steps, "tried": polished.tried, "decided_on": polished.decided_on}
    with replacing(_path(job, target)) as temporary:
        save_file(tensors, temporary, {"fingerprint": digest, "polished": json.dumps(told)})


def kept(job: Job, target: Target, digest: str) -> Polished | None:
    """The adapter that was polished in just this way; None where there is none, or none that can be read."""
    unreadable = suppress(OSError, SafetensorError, ValueError, KeyError, TypeError)
    with unreadable, safe_open(_path(job, target), "pt") as file:
        if file.metadata()["fingerprint"] != digest:
            return None
        layers = [name.removesuffix(DOWN) for name in file.keys() if name.endswith(DOWN)]  # noqa: SIM118
        updates = {
            layer: LowRank(file.get_tensor(f"{layer}{DOWN}"), file.get_tensor(f"{layer}{UP}")) for layer in layers
        }
        return Polished(**json.loads(file.metadata()["polished"]), updates=updates)
    return None


def _path(job: Job, target: Target) -> Path:
    return job.folder / FOLDER / f"{target.name}.safetensors"
