"""Second pass of an export: every static adapter on the run's backbone, polished where its mean lost something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from torch import Tensor

from qmixlora.files import replacing
from qmixlora.session import TunedSession

from .fidelity import WHOLE_MODULES, ByLayer, Fidelity, write_card
from .job import Job, rows_of
from .live import Live
from .measurement import measure, supervised_outputs
from .polish import START, has_lost, is_better, polish
from .static import Learned, StaticAdapter, lora_session, projector_as_low_rank, put, taken_off
from .stops import CARRIED, carry_stops


@dataclass(frozen=True)
class Adapter:
    """A static adapter that is written, and the logits that a merged checkpoint of it has to give."""

    live: Live
    folder: Path
    fidelity: Fidelity
    outputs: Tensor | None


class Polished(NamedTuple):
    """The polishing steps of the adapter that was kept, and those that were made."""

    kept: int
    tried: int


def write_adapters(
    job: Job, session: TunedSession, learned: Learned, live: Sequence[Live], scratch: Path
) -> list[Adapter]:
    """Write the static adapter of every target; into `scratch` where only merged checkpoints are asked for."""
    static = lora_session(session, _static(job, learned, live[0])[0], trained=set(learned.pools))
    adapters = []
    for number, one in enumerate(live, start=1):
        mean, kept = _static(job, learned, one)
        put(static.model, mean)
        polished = _polish(job, static, mean, one, learned.is_mixture, f"{number}/{len(live)} {one.target.name}")
        wanted = "lora" in job.request.forms
        final = job.folder_of(one.target, "lora") if wanted else scratch / f"{one.target.name}-lora"
        fidelity = Fidelity(
            folder=final,
            run=job.folder,
            tasks=one.target.shares,
            split=one.split,
            samples=len(one.rows),
            rank=max(update.rank for update in mean.updates.values()),
            polish_steps=polished.kept,
            polish_tried=polished.tried,
            decided_on=None if one.check is None else one.check.source,
            kept={name: ByLayer(shares) for name, shares in kept.items()},
            update_error=ByLayer(one.updates.errors(learned, taken_off(static.model))),
            live=one.measurement,
            measurements={"lora": measure(static, one.rows)},
            notes=(WHOLE_MODULES,) if mean.modules else (),
        )
        compares = "merged" in job.request.forms and not job.into_another_base
        outputs = supervised_outputs(static, one.compared) if compares else None
        if wanted:
            job.say_what_is_replaced(final, fidelity)
        with replacing(final) as temporary:
            static.model.save_pretrained(str(temporary))
            if carry_stops(temporary, static):
                fidelity = replace(fidelity, notes=(*fidelity.notes, CARRIED))
            write_card(temporary, fidelity)
            job.finish(temporary, fidelity)
        adapters.append(Adapter(one, final, fidelity, outputs))
    return adapters


def _static(job: Job, learned: Learned, live: Live) -> tuple[StaticAdapter, dict[str, dict[str, float]]]:
    """The mean's adapter, cut as asked for, and the shares that the cuts keep."""
    adapter = learned.adapter(live.mix_LEF)
    kept: dict[str, dict[str, float]] = {}
    if job.request.rank is not None:
        adapter, kept["rank"] = adapter.truncated(job.request.rank)
    if job.request.projector_rank is not None:
        adapter, kept["projector"] = projector_as_low_rank(adapter, learned, job.request.projector_rank)
    return adapter, kept


def _polish(job: Job, static: TunedSession, mean: StaticAdapter, live: Live, is_mixture: bool, name: str) -> Polished:
    """Polish the adapter in place if that was asked for, or if its mean lost something; keep the better of the two."""
    steps, check = job.polish_steps, live.check

    def train(rows: Dataset) -> None:
        job.say(f"{name}: polishing, {steps} steps")
        polish(static, mean, rows, steps, job.console, start=START if is_mixture else 1.0)  # a plain LoRA is no mean

    if not steps:
        return Polished(0, 0)
    if check is None:  # asked for
        train(rows_of(job.training_rows, live.target, None, "train"))
        return Polished(steps, steps)
    before = measure(static, check.rows)
    if not has_lost(before, check.live) or not len(check.polish_on):  # all of its rows decide, where there is but one
        return Polished(0, 0)
    train(check.polish_on)
    if is_better(measure(static, check.rows), before):
        return Polished(steps, steps)
    put(static.model, mean)
    return Polished(0, steps)
