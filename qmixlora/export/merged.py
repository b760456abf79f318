"""Third pass of an export: every adapter merged into the base, loaded with stock transformers, and checked."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from qmixlora.backbone.levers import without_levers
from qmixlora.errors import CheckError
from qmixlora.files import replacing
from qmixlora.out_of_memory import unless_out_of_memory
from qmixlora.recipe import edited
from qmixlora.session import Session, open_run, with_whole_model

from .adapters import Adapter
from .fidelity import Fidelity, Merging
from .job import RECIPE, Job
from .live import Live
from .measurement import Measurement, measure, supervised_outputs
from .merge import Merge
from .settings import carry_settings
from .static import lora_session, put

# ||merged - adapter|| / ||adapter|| over logits, as far as rounding the sums once explains it, by the weights' dtype.
# Seen on the embedded model: 4e-7, 7e-4 and 6e-3; a deeper one rounds more often.
ROUNDING = {"float32": 1e-4, "float16": 0.005, "bfloat16": 0.03}


def write_merged(job: Job, adapters: Sequence[Adapter]) -> list[Fidelity]:
    """Write a merged checkpoint of every adapter, and check its logits against its adapter's.

    Raises CheckError as `export`.
    """
    made = []
    for number, adapter in enumerate(_on_base(job, adapters) if job.into_another_base else adapters, start=1):
        clear_device_cache(garbage_collection=True)
        live, final = adapter.live, job.folder_of(adapter.live.target, "merged")
        with replacing(final) as temporary:
            merge = Merge(adapter.read(), job.recipe.model, job.base)
            with job.bar(f"{number}/{len(adapters)} {live.target.name}: merging") as show:
                merge.write(temporary, show)
            shutil.copyfile(job.folder / RECIPE, temporary / RECIPE)
            carry_settings(temporary, job.recipe, job.collator)
            outputs, measured = _measured(temporary, live)
            assert adapter.outputs is not None, "they were computed on the base"
            difference = float((outputs - adapter.outputs).norm() / adapter.outputs.norm())
            _check_difference(job, difference, final)
            fidelity = replace(
                adapter.fidelity,
                folder=final,
                measurements={**adapter.fidelity.measurements, "merged": measured},
                merging=Merging(job.base, difference),
                notes=(),
            )
            job.finish(temporary, fidelity)
            job.say_what_is_replaced(final, fidelity)
        made.append(fidelity)
    return made


def _measured(folder: Path, live: Live) -> tuple[Tensor, Measurement]:
    """A merged checkpoint's logits of the rows to compare, and its measurement: one row at a time where a card that is
    full of its weights has no memory left for the answers to a batch.
    """

    def measured(*overrides: str) -> tuple[Tensor, Measurement]:
        merged = open_run(folder)
        merged = replace(merged, recipe=edited(merged.recipe, list(overrides)))
        return supervised_outputs(merged, live.compared), measure(merged, live.rows)

    return unless_out_of_memory(measured) or measured("train.eval_batch_size=1")


def _on_base(job: Job, adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters with their logits on the base that they are merged into: the run's model without its levers, with
    experts in 16 bits.
    """
    spec = without_levers(job.recipe.model)
    if job.base == "original":
        spec = spec.model_copy(update={"quantization": "none"})
    else:
        spec = spec.model_copy(update={"keep": [*spec.keep, *job.experts]})

    def computed(session: Session) -> list[Adapter]:
        static = lora_session(session, adapters[0].read())
        moved = []
        for adapter in adapters:
            put(static.model, adapter.read())
            moved.append(replace(adapter, outputs=supervised_outputs(static, adapter.live.compared)))
        return moved

    return with_whole_model(job.recipe.model_copy(update={"model": spec}), computed)


def _check_difference(job: Job, difference: float, final: Path) -> None:
    allowed = ROUNDING[job.recipe.model.dtype]
    if not difference <= allowed:
        raise CheckError(
            f"The merged checkpoint does not compute what its adapter computes: the logits differ by "
            f"{difference:.2g} of their size, and rounding explains {allowed:g}. It was removed.",
            where=str(final),
            fix="Export --as lora, which is measured on its own; and report this, with the model's name.",
        )
