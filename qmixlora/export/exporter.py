"""A run to ordinary artefacts, `exports/NAME-lora/` and `exports/NAME-merged/`, measured before they are in place.

Three passes over the targets, so that never more than one model is in memory: `measure_live` with the run's own model,
`write_adapters` with the static adapters on the same backbone, `write_merged` with the merged checkpoints.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from torch import Tensor

from qmixlora.backbone.levers import without_levers
from qmixlora.data import Conversation, indices_by_task, load_split
from qmixlora.errors import CheckError, UserError
from qmixlora.files import clear_disk_errors, replacing, write_json
from qmixlora.recipe import Recipe
from qmixlora.session import TunedSession, open_model, open_run, open_tuned_run

from .calibration import mixing_matrices
from .fidelity import FIDELITY, WHOLE_MODULES, ByLayer, Fidelity, Merging, write_card
from .measurement import LiveUpdates, Measurement, measure, measure_updates, supervised_outputs
from .merge import Merge
from .polish import START, has_lost, is_better, polish
from .static import Learned, StaticAdapter, learned_by, lora_session, projector_as_low_rank, put, read, taken_off
from .targets import Request, Target, make_targets, tasks_of

FOLDER = "exports"
CHECKED = 128  # rows per task on which it is decided whether a mean lost something
COMPARED = 4  # held-out rows whose logits hold a merged checkpoint against its adapter
# ||merged - adapter|| / ||adapter|| over logits: what rounding the sums once explains, by the dtype of the weights.
# Seen on the embedded model: 4e-7, 7e-4 and 6e-3; a deeper one rounds more often.
ROUNDING = {"float32": 1e-4, "float16": 0.005, "bfloat16": 0.03}


@dataclass(frozen=True)
class Job:
    """A request on a run: its folder, its recipe, and where people are told."""

    folder: Path
    recipe: Recipe
    request: Request
    console: Console

    @cached_property
    def training_rows(self) -> Dataset:
        return load_split(self.recipe.data, "train")

    @property
    def polish_steps(self) -> int:
        return self.recipe.export.polish if self.request.polish is None else self.request.polish

    @property
    def into_another_base(self) -> bool:
        """Whether merging is into other weights than the run's adapters lie on: into the original ones, or for a run
        with its head or embeddings in 8 or 4 bits, of which a merged checkpoint has the 16-bit ones.
        """
        spec = self.recipe.model
        return self.request.base == "original" or {spec.quantize_lm_head, spec.quantize_embeddings} != {"none"}

    def folder_of(self, target: Target, form: str) -> Path:
        return self.folder / FOLDER / f"{target.name}-{form}"

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)


@dataclass(frozen=True)
class Check:
    """The rows on which it is decided whether a mean lost something: of `source`, with the live model's measurement;
    and the training rows to polish on, which are others.
    """

    source: str
    rows: Dataset
    live: Measurement
    polish_on: Dataset


@dataclass(frozen=True)
class Live:
    """The live model on one target: its mixing matrices, and its measurement and updates on held-out rows."""

    target: Target
    mix_LEF: Tensor
    split: str
    rows: Dataset
    measurement: Measurement
    updates: LiveUpdates
    check: Check | None  # without one, the user decides

    @property
    def compared(self) -> list[Conversation]:
        """The rows whose logits hold a merged checkpoint against its adapter."""
        return [self.rows[index] for index in range(min(COMPARED, len(self.rows)))]


@dataclass(frozen=True)
class Adapter:
    """A static adapter that is written, and the logits that a merged checkpoint of it has to give."""

    live: Live
    folder: Path
    fidelity: Fidelity
    outputs: Tensor | None


def export(folder: Path, request: Request, console: Console) -> list[Fidelity]:
    """Export a run as `request` says, into `folder/exports`; returns the fidelity of every export.

    Raises:
        UserError: no such run, task or data; a base that cannot be merged into; a full disk.
        CheckError: a merged checkpoint does not compute what its adapter computes; nothing of it stays.
    """
    session = open_tuned_run(folder)
    job = Job(folder, session.recipe, request, console)
    learned = learned_by(session.model)
    live = measure_live(job, session, learned)
    with clear_disk_errors(folder / FOLDER, "Free some space and export again; what is in place is whole."):
        scratch = folder / FOLDER / ".scratch"
        try:
            adapters = write_adapters(job, session, learned, live, scratch)
            del session  # before other models are loaded
            made = [adapter.fidelity for adapter in adapters if "lora" in request.forms]
            return made + (write_merged(job, adapters) if "merged" in request.forms else [])
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def measure_live(job: Job, session: TunedSession, learned: Learned) -> list[Live]:
    """First pass: the mixing matrices of every target, and the live model on its rows."""
    request, data = job.request, job.recipe.data
    tasks = tasks_of(job.folder, lambda: job.training_rows)
    targets = make_targets(request, tasks)
    wanted = [task for task in tasks if any(task in target.shares for target in targets)]
    matrices = mixing_matrices(session, learned, job.folder, request.calibration, wanted, lambda: job.training_rows)
    split = next((name for name in ("test", "validation") if getattr(data, name)), "train")
    held_out, samples = load_split(data, split), request.samples or job.recipe.export.samples
    measured = []
    for number, target in enumerate(targets, start=1):
        job.say(f"{number}/{len(targets)} {target.name}: measuring the live model")
        rows = _rows_of(held_out, target, samples, split)
        measured.append(
            Live(
                target,
                target.mixing_matrix(matrices),
                split,
                rows,
                measure(session, rows),
                measure_updates(session, learned, rows),
                _check(job, session, target) if job.polish_steps and request.polish is None else None,
            )
        )
    return measured


def write_adapters(
    job: Job, session: TunedSession, learned: Learned, live: Sequence[Live], scratch: Path
) -> list[Adapter]:
    """Second pass: every static adapter on the run's backbone, polished where it lost something, and written; into
    `scratch` where only merged checkpoints are asked for.
    """
    static = lora_session(session, _static(job, learned, live[0])[0], trained=set(learned.pools))
    adapters = []
    for number, one in enumerate(live, start=1):
        mean, kept = _static(job, learned, one)
        put(static.model, mean)
        steps = _polish(job, static, mean, one, learned.is_mixture, f"{number}/{len(live)} {one.target.name}")
        wanted = "lora" in job.request.forms
        final = job.folder_of(one.target, "lora") if wanted else scratch / f"{one.target.name}-lora"
        fidelity = Fidelity(
            folder=final,
            run=job.folder,
            tasks=one.target.shares,
            split=one.split,
            samples=len(one.rows),
            rank=max(update.rank for update in mean.updates.values()),
            polish_steps=steps,
            decided_on=None if one.check is None else one.check.source,
            kept={name: ByLayer(shares) for name, shares in kept.items()},
            update_error=ByLayer(one.updates.errors(learned, taken_off(static.model))),
            live=one.measurement,
            measurements={"lora": measure(static, one.rows)},
            notes=(WHOLE_MODULES,) if mean.modules else (),
        )
        compares = "merged" in job.request.forms and not job.into_another_base
        outputs = supervised_outputs(static, one.compared) if compares else None
        with replacing(final) as temporary:
            static.model.save_pretrained(str(temporary))
            write_card(temporary, fidelity)
            _finish(job, temporary, fidelity)
        adapters.append(Adapter(one, final, fidelity, outputs))
    return adapters


def write_merged(job: Job, adapters: Sequence[Adapter]) -> list[Fidelity]:
    """Third pass: every adapter merged into the base, loaded with stock transformers, and checked against it.

    Raises CheckError as `export`.
    """
    made = []
    for number, adapter in enumerate(_on_base(job, adapters) if job.into_another_base else adapters, start=1):
        clear_device_cache(garbage_collection=True)
        live, final = adapter.live, job.folder_of(adapter.live.target, "merged")
        with replacing(final) as temporary:
            merge = Merge(read(adapter.folder), job.recipe.model, job.request.base)
            with _bar(job, f"{number}/{len(adapters)} {live.target.name}: merging") as show:
                merge.write(temporary, show)
            shutil.copyfile(job.folder / "recipe.yaml", temporary / "recipe.yaml")
            merged = open_run(temporary)
            outputs = supervised_outputs(merged, live.compared)
            assert adapter.outputs is not None, "they were computed on the base"
            difference = float((outputs - adapter.outputs).norm() / adapter.outputs.norm())
            _check_difference(job, difference, final)
            fidelity = replace(
                adapter.fidelity,
                folder=final,
                measurements={**adapter.fidelity.measurements, "merged": measure(merged, live.rows)},
                merging=Merging(job.request.base, difference),
                notes=(),
            )
            _finish(job, temporary, fidelity)
            del merged
        made.append(fidelity)
    return made


def _check(job: Job, session: TunedSession, target: Target) -> Check:
    """Rows that the run was not trained on: of the validation split, else training rows that polishing leaves out."""
    training = _rows_of(job.training_rows, target, None, "train")
    if job.recipe.data.validation:
        rows = _rows_of(load_split(job.recipe.data, "validation"), target, CHECKED, "validation")
        return Check("validation", rows, measure(session, rows), training)
    set_aside = {index for own in indices_by_task(training).values() for index in own[:: max(5, len(own) // CHECKED)]}
    rows = training.select(sorted(set_aside))
    polish_on = training.select([index for index in range(len(training)) if index not in set_aside])
    return Check("train, left out of polishing", rows, measure(session, rows), polish_on)


def _static(job: Job, learned: Learned, live: Live) -> tuple[StaticAdapter, dict[str, dict[str, float]]]:
    """The mean's adapter, cut as asked for, and the shares that the cuts keep."""
    adapter = learned.adapter(live.mix_LEF)
    kept: dict[str, dict[str, float]] = {}
    if job.request.rank is not None:
        adapter, kept["rank"] = adapter.truncated(job.request.rank)
    if job.request.projector_rank is not None:
        adapter, kept["projector"] = projector_as_low_rank(adapter, learned, job.request.projector_rank)
    return adapter, kept


def _polish(job: Job, static: TunedSession, mean: StaticAdapter, live: Live, is_mixture: bool, name: str) -> int:
    """Polish the adapter in place if that was asked for, or if its mean lost something and polishing makes it better;
    return the steps of the adapter that stays.
    """
    steps, check = job.polish_steps, live.check
    if not steps:
        return 0
    start = START if is_mixture else 1.0  # a plain LoRA is no mean of anything
    if check is None:
        job.say(f"{name}: polishing, {steps} steps")
        rows = _rows_of(job.training_rows, live.target, None, "train")
        polish(static, mean, rows, steps, job.console, start=start)
        return steps
    before = measure(static, check.rows)
    if not has_lost(before, check.live):
        return 0
    job.say(f"{name}: polishing, {steps} steps")
    polish(static, mean, check.polish_on, steps, job.console, start=start)
    if is_better(measure(static, check.rows), before):
        return steps
    put(static.model, mean)
    return 0


def _on_base(job: Job, adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters with their logits on the base that they are merged into."""
    spec = without_levers(job.recipe.model)
    if job.request.base == "original":
        spec = spec.model_copy(update={"quantization": "none"})
    session = open_model(job.recipe.model_copy(update={"model": spec}))
    static = lora_session(session, read(adapters[0].folder))
    moved = []
    for adapter in adapters:
        put(static.model, read(adapter.folder))
        moved.append(replace(adapter, outputs=supervised_outputs(static, adapter.live.compared)))
    return moved


def _check_difference(job: Job, difference: float, final: Path) -> None:
    allowed = ROUNDING[job.recipe.model.dtype]
    if not difference <= allowed:
        raise CheckError(
            f"The merged checkpoint does not compute what its adapter computes: the logits differ by "
            f"{difference:.2g} of their size, and rounding explains {allowed:g}. It was removed.",
            where=str(final),
            fix="Export --as lora, which is measured on its own; and report this, with the model's name.",
        )


def _finish(job: Job, folder: Path, fidelity: Fidelity) -> None:
    if not (folder / "recipe.yaml").is_file():
        shutil.copyfile(job.folder / "recipe.yaml", folder / "recipe.yaml")
    write_json(folder / FIDELITY, fidelity.to_dict())


@contextmanager
def _bar(job: Job, text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over bytes; a plain line off a terminal."""
    if not job.console.is_terminal:
        job.say(text)
    columns = (TextColumn(text), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, console=job.console, transient=True, disable=not job.console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _rows_of(rows: Dataset, target: Target, per_task: int | None, split: str) -> Dataset:
    """The first rows of every task of a target. Raises UserError if there are none."""
    by_task = indices_by_task(rows)
    chosen = [index for task in target.shares for index in by_task.get(task, [])[:per_task]]
    if not chosen:
        raise UserError(f"There is no sample of {', '.join(target.shares)} to measure on.", where=f"split {split}")
    return rows.select(chosen)
