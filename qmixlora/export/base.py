"""The base of a run's LoRAs: its model with the trained projector, once for all of them, as an ordinary checkpoint.

A run's projector is the same in all of its exports, and servers take no whole modules beside a LoRA: vLLM refuses
them, llama.cpp's converter leaves them out, and PEFT neither adds nor mixes adapters that have them.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qmixlora.bases import RECORD, base_record, read_record
from qmixlora.files import replacing, write_json
from qmixlora.manifest import first_change, seal

from .job import RECIPE, Job
from .merge import Merge
from .settings import carry_settings
from .static import Learned, StaticAdapter


def write_base(job: Job, learned: Learned) -> Path | None:
    """Write `exports/base/` for the run's LoRAs, unless it is there already; returns its folder.

    None where none needs it: a run without a trained projector lies on its own model.

    Raises:
        UserError: the model's checkpoint cannot be read, or the projector has no tensors of its own in it.
    """
    if job.request.projector != "base" or not learned.projector:
        return None
    folder, spec = job.base_folder, job.recipe.model
    record = base_record(spec.id, spec.revision, _digest(learned.projector))
    if folder.exists():
        reason = _reason_to_replace(job, folder, record)
        if reason is None:
            return folder
        job.say(f"{folder} is replaced: {reason}")
    with replacing(folder) as temporary:
        with job.bar("base: with the trained projector") as show:
            Merge(StaticAdapter({}, in_base=learned.projector), spec, "original").write(temporary, show)
        carry_settings(temporary, job.recipe, job.collator)
        shutil.copyfile(job.folder / RECIPE, temporary / RECIPE)
        write_json(temporary / RECORD, record)
        seal(temporary)
    return folder


def _reason_to_replace(job: Job, folder: Path, record: Mapping[str, object]) -> str | None:
    """Why the base in place cannot stay; None for a whole one of this projector, and of this recipe."""
    if first_change(folder, [RECORD]) is None and read_record(folder) != record:
        return "it has another projector or model. Adapters that lie on it are of use no longer: export them again."
    if change := first_change(folder):
        return f"it is not as it was written: {change}."
    if (folder / RECIPE).read_bytes() != (job.folder / RECIPE).read_bytes():
        return "the run's recipe is another one. Adapters that lie on it stay of use."
    return None


def _digest(modules: Mapping[str, Tensor]) -> str:
    """SHA-256 of the modules' names and values."""
    digest = hashlib.sha256()
    for name in sorted(modules):
        digest.update(name.encode())
        digest.update(modules[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
