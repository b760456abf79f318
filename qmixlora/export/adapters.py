"""Second pass of an export: every static adapter on the run's backbone, polished where its mean lost something."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset
from torch import Tensor

from qmixlora.adapter import ADAPTER_CONFIG
from qmixlora.backbone.rewritten import renamed_on_loading
from qmixlora.bases import RECORD
from qmixlora.errors import UserError
from qmixlora.files import replacing, write_json
from qmixlora.session import TunedSession

from .card import write_card
from .fidelity import LIMITED, ByLayer, Fidelity, notes_on
from .job import Job, rows_of
from .live import Live
from .measurement import measure, supervised_outputs
from .polish import START, has_lost, is_better, polish
from .polished import Polished, keep
from .settings import CARRIED, carry_stops
from .static import (
    Learned,
    StaticAdapter,
    lora_session,
    projector_as_low_rank,
    projector_in_base,
    put,
    read,
    taken_off,
)


@dataclass(frozen=True)
class Adapter:
    """A written static adapter, what its base has of it, and the logits that a merged checkpoint has to give."""

    live: Live
    folder: Path
    fidelity: Fidelity
    outputs: Tensor | None
    in_base: Mapping[str, Tensor]

    def read(self) -> StaticAdapter:
        """All of it."""
        return replace(read(self.folder), in_base=dict(self.in_base))


def write_adapters(
    job: Job, session: TunedSession, learned: Learned, live: Sequence[Live], base: Path | None, scratch: Path
) -> list[Adapter]:
    """Write the static adapter of every target, on `base` if they have one of their own; into `scratch` where only
    merged checkpoints are asked for.
    """
    if "lora" in job.request.forms:
        _check_names(session, learned)
    static = lora_session(session, _static(job, learned, live[0])[0], trained=set(learned.pools))
    adapters = []
    for number, one in enumerate(live, start=1):
        mean, kept = _static(job, learned, one)
        put(static.model, mean)
        rank, projector = _rank(mean, learned), _place_of_projector(job, learned)
        polished = _polish(job, static, mean, one, learned.is_mixture, f"{number}/{len(live)} {one.target.name}")
        wanted = "lora" in job.request.forms
        final = job.folder_of(one.target, "lora") if wanted else scratch / f"{one.target.name}-lora"
        fidelity = Fidelity(
            folder=final,
            run=job.folder,
            tasks=one.target.shares,
            split=one.split,
            unmeasured=one.unmeasured,
            samples=len(one.rows),
            rank=rank,
            polish_steps=polished.steps,
            polish_tried=polished.tried,
            decided_on=polished.decided_on,
            kept={name: ByLayer(shares) for name, shares in kept.items()},
            update_error=ByLayer(one.updates.errors(learned, taken_off(static.model))),
            live=one.measurement,
            measurements={"lora": measure(static, one.rows)},
            projector=projector,
            in_nf4=job.recipe.model.quantization == "nf4",
            notes=notes_on(projector, rank),
        )
        compares = "merged" in job.request.forms and not job.into_another_base
        outputs = supervised_outputs(static, one.compared) if compares else None
        if wanted:
            job.say_what_is_replaced(final, fidelity)
        with replacing(final) as temporary:
            fidelity = _save(job, static, base, temporary, fidelity)
        adapters.append(Adapter(one, final, fidelity, outputs, mean.in_base))
    return adapters


def _check_names(session: TunedSession, learned: Learned) -> None:
    """Refuse a LoRA that stock PEFT would load into nothing. Raises UserError."""
    if renamed := renamed_on_loading(session.backbone, list(learned.pools)):
        raise UserError(
            f"Stock PEFT looks for a LoRA on {type(session.backbone).__name__} under other names than its layers have, "
            f"such as {renamed[0]}, and would load none of it.",
            where="--as lora",
            fix="Export merged checkpoints (--as merged), or serve the run itself.",
        )


def _save(job: Job, static: TunedSession, base: Path | None, folder: Path, fidelity: Fidelity) -> Fidelity:
    """Write the adapter on the model into the folder; returns its fidelity, with what else there is to know."""
    static.model.save_pretrained(str(folder))
    if base is not None:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        own = {"base_model_name_or_path": str(base.resolve()), "revision": None}
        write_json(folder / ADAPTER_CONFIG, {**config, **own})
        shutil.copyfile(base / RECORD, folder / RECORD)
    else:
        limit = job.recipe.data.max_image_tokens
        carried = (CARRIED,) if carry_stops(folder, static) else ()
        limited = () if limit is None else (LIMITED.format(limit=limit),)
        fidelity = replace(fidelity, notes=(*fidelity.notes, *carried, *limited))
    write_card(folder, fidelity, job.source_on(base))
    job.finish(folder, fidelity)
    return fidelity


def _static(job: Job, learned: Learned, live: Live) -> tuple[StaticAdapter, dict[str, dict[str, float]]]:
    """The mean's adapter, cut as asked for, and the shares that the cuts keep."""
    adapter = learned.adapter(live.mix_LEF)
    kept: dict[str, dict[str, float]] = {}
    if job.request.rank is not None:
        adapter, kept["rank"] = adapter.truncated(job.request.rank)
    if job.request.projector == "base":
        adapter = projector_in_base(adapter, learned)
    elif job.request.projector == "low-rank" and learned.modules:
        rank = job.request.projector_rank or _rank(adapter, learned)
        adapter, kept["projector"] = projector_as_low_rank(adapter, learned, rank)
    return adapter, kept


def _place_of_projector(job: Job, learned: Learned) -> str | None:
    """Where the trained projector is; None where there is none. One with factors has no whole modules to hand over."""
    if not learned.projector:
        return None
    return "low-rank" if job.request.projector == "adapter" and not learned.modules else job.request.projector


def _rank(adapter: StaticAdapter, learned: Learned) -> int:
    """The rank of the language model's layers."""
    return max(adapter.updates[layer].rank for layer in learned.pools)


def _polish(job: Job, static: TunedSession, mean: StaticAdapter, live: Live, is_mixture: bool, name: str) -> Polished:
    """Polish the adapter in place if that was asked for, or if its mean lost something; keep the better of the two.

    One that an earlier export has polished in the same way is put there instead.
    """
    if live.fingerprint is None:
        return Polished(0, 0, None, {})
    polished = live.polished
    if polished is None:
        polished = _decide(job, static, mean, live, is_mixture, name)
        keep(job, live.target, live.fingerprint, polished)
    elif polished.tried:
        job.say(f"{name}: polished before, {polished.tried} steps")
    put(static.model, replace(mean, updates={**mean.updates, **polished.updates}))
    return polished


def _decide(job: Job, static: TunedSession, mean: StaticAdapter, live: Live, is_mixture: bool, name: str) -> Polished:
    steps, check = job.polish_steps, live.check

    def train(rows: Dataset) -> Polished:
        job.say(f"{name}: polishing, {steps} steps")
        polish(static, mean, rows, steps, job.console, start=START if is_mixture else 1.0)  # a plain LoRA is no mean
        source = None if check is None else check.source
        return Polished(steps, steps, source, taken_off(static.model).updates)

    if check is None:  # asked for
        return train(rows_of(job.training_rows, live.target, None, "train"))
    before = measure(static, check.rows)
    if not has_lost(before, check.live) or not len(check.polish_on):  # all of its rows decide, where there is but one
        return Polished(0, 0, check.source, {})
    polished = train(check.polish_on)
    better = is_better(measure(static, check.rows), before)
    return polished if better else replace(polished, steps=0, updates={})
