"""A run to ordinary artefacts, `exports/NAME-lora/` and `exports/NAME-merged/`, measured before they are in place.

Three passes over the exports, so that never more than one model is in memory: with the live model, with the static
adapters on the same backbone, with the merged checkpoints.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from torch import Tensor

from qmixlora.backbone import without_levers
from qmixlora.errors import CheckError, UserError
from qmixlora.evaluation.answers import indices_by_task
from qmixlora.files import clear_disk_errors, put_in_place, write_json
from qmixlora.session import Session, open_model, open_run
from qmixlora.training.run import load_data

from .fidelity import FIDELITY, TOLERATED, WHOLE_MODULES, by_layer, report, write_card
from .measurement import LiveUpdates, Reading, Rows, measure, measure_live, supervised_outputs
from .merge import Merge
from .polish import START, polish
from .static import StaticAdapter, learned, lora_session, projector_as_low_rank, put, read, taken_off
from .targets import Plan, Request, make_plans, mixes_by_task, tasks_of

FOLDER = "exports"
CHECKED = 128  # training rows on which it is decided whether a mean lost something
COMPARED = 4  # held-out rows whose logits hold a merged checkpoint against its adapter
# ||merged - adapter|| / ||adapter|| over logits: what rounding the sums once explains, by the dtype of the weights.
# Seen on the embedded model: 4e-7, 7e-4 and 6e-3; a deeper one rounds more often.
ROUNDING = {"float32": 1e-4, "float16": 0.005, "bfloat16": 0.03}


@dataclass
class Export:
    """One export on its way: what the live model did on its held-out `rows` and scored on `check`, training rows; then
    where its `lora` lies, what that did, and the logits that a merged checkpoint has to give.
    """

    plan: Plan
    mix_LEF: Tensor
    rows: Rows
    live: Reading
    updates: LiveUpdates
    check: Rows
    score: float
    facts: dict[str, Any]
    lora: Path = Path()
    exported: Reading = field(default_factory=lambda: Reading(0.0, 0.0, []))
    outputs: Tensor | None = None

    @property
    def compared(self) -> list[Mapping[str, Any]]:
        return [self.rows[index] for index in range(min(COMPARED, len(self.rows)))]


def export(folder: Path, request: Request, console: Console) -> list[dict[str, Any]]:
    """Export a run as `request` says, into `folder/exports`; returns the contents of every `fidelity.json`.

    Raises:
        UserError: no such run, task or data; a base that cannot be merged into; a full disk.
        CheckError: a merged checkpoint does not compute what its adapter computes; nothing of it stays.
    """
    exporter = Exporter(folder, request, console)
    exports = exporter.with_live_model()
    reports: list[dict[str, Any]] = []
    with clear_disk_errors(folder / FOLDER, "Free some space and export again; what is in place is whole."):
        try:
            reports += exporter.with_adapters(exports)
            if "merged" in request.forms:
                reports += exporter.with_merged_models(exports)
        finally:
            shutil.rmtree(exporter.scratch, ignore_errors=True)
    return reports


class Exporter:
    """What the passes share. `session` is the run's; `run` what it learned, off the model."""

    def __init__(self, folder: Path, request: Request, console: Console) -> None:
        self.folder, self.request, self.console = folder, request, console
        self.exports, self.scratch = folder / FOLDER, folder / FOLDER / ".scratch"
        self.session: Session | None = open_run(folder)
        self.recipe, self.run = self.session.recipe, learned(self.session.model)
        self.polish = self.recipe.export.polish if request.polish is None else request.polish
        self.samples = request.samples or self.recipe.export.samples

    @property
    def another_base(self) -> bool:
        """Whether what is merged into is not what the run's adapters lie on: `original`, or a run with its head or
        embeddings in 8 or 4 bits, of which a merged checkpoint has the 16-bit ones.
        """
        spec = self.recipe.model
        return self.request.base == "original" or {spec.quantize_lm_head, spec.quantize_embeddings} != {"none"}

    @cached_property
    def training_rows(self) -> Any:
        return load_data(self.recipe.data, "train")

    def with_live_model(self) -> list[Export]:
        """First pass: mixing matrices, and what the live model does on the rows of every export."""
        session, data = self.session, self.recipe.data
        assert session is not None
        tasks = tasks_of(self.folder, lambda: self.training_rows)
        plans = make_plans(self.request, tasks)
        wanted = [task for task in tasks if any(task in plan.shares for plan in plans)]
        mixes = mixes_by_task(session, self.run, self.folder, self.request, wanted, lambda: self.training_rows)
        split = next((name for name in ("test", "validation") if getattr(data, name)), "train")
        held_out = load_data(data, split)
        exports = []
        for number, plan in enumerate(plans, start=1):
            self._say(f"{number}/{len(plans)} {plan.name}: measuring the live model")
            rows = _rows_of(held_out, plan, self.samples, split)
            live, updates = measure_live(session, self.run, rows)
            undecided = self.polish and self.request.polish is None
            check = _rows_of(self.training_rows, plan, CHECKED, "train") if undecided else []
            score = measure(session, check).exact_match if check else 0.0
            facts = {"run": str(self.folder), "tasks": plan.shares, "split": split, "held_out": split != "train"}
            facts["samples"] = len(rows)
            exports.append(Export(plan, plan.mix(mixes), rows, live, updates, check, score, facts))
        return exports

    def with_adapters(self, exports: list[Export]) -> Iterator[dict[str, Any]]:
        """Second pass: every static adapter on the run's backbone, polished where it lost something, and written."""
        assert self.session is not None
        adapter, _ = self._static(exports[0])
        static = lora_session(self.session, adapter, trained=set(self.run.pools))
        self.session = None
        for number, export_ in enumerate(exports, start=1):
            adapter, kept = self._static(export_)
            put(static.model, adapter)
            polished = self._polish(static, adapter, export_, f"{number}/{len(exports)} {export_.plan.name}")
            export_.exported = measure(static, export_.rows)
            errors = export_.updates.errors(self.run, taken_off(static.model))
            export_.facts |= {
                "rank": max(update.rank for update in adapter.updates.values()),
                "polish_steps": polished,
                "kept": {name: by_layer(shares) for name, shares in kept.items()},
                "update_error": by_layer(errors),
                "notes": [WHOLE_MODULES] if adapter.modules else [],
            }
            if "merged" in self.request.forms and not self.another_base:
                export_.outputs = supervised_outputs(static, export_.compared)
            wanted = "lora" in self.request.forms
            final = (self.exports if wanted else self.scratch) / f"{export_.plan.name}-lora"
            with put_in_place(final) as place:
                static.model.save_pretrained(str(place))
                made = report(export_.facts, "lora", final, export_.live, lora=export_.exported)
                write_card(place, made)
                self._finish(place, made)
            export_.lora = final
            if wanted:
                yield made

    def with_merged_models(self, exports: list[Export]) -> Iterator[dict[str, Any]]:
        """Third pass: every adapter merged into the base, loaded with stock transformers, and checked against it."""
        if self.another_base:
            self._run_on_base(exports)
        for number, export_ in enumerate(exports, start=1):
            _free()
            final = self.exports / f"{export_.plan.name}-merged"
            with put_in_place(final) as place:
                merge = Merge(read(export_.lora), self.recipe.model, self.request.base)
                with self._bar(f"{number}/{len(exports)} {export_.plan.name}: merging") as show:
                    merge.write(place, show)
                shutil.copyfile(self.folder / "recipe.yaml", place / "recipe.yaml")
                merged = open_run(place)
                outputs = supervised_outputs(merged, export_.compared)
                assert export_.outputs is not None
                difference = float((outputs - export_.outputs).norm() / export_.outputs.norm())
                self._check(difference, final)
                facts = {**export_.facts, "base": self.request.base, "logits_difference": difference, "notes": []}
                readings = {"lora": export_.exported, "merged": measure(merged, export_.rows)}
                made = report(facts, "merged", final, export_.live, **readings)
                self._finish(place, made)
                del merged
            yield made

    def _static(self, export_: Export) -> tuple[StaticAdapter, dict[str, dict[str, float]]]:
        """The mean's adapter, cut as asked for, and the shares that the cuts keep."""
        adapter, kept = self.run.adapter(export_.mix_LEF), {}
        if self.request.rank is not None:
            adapter, kept["rank"] = adapter.truncated(self.request.rank)
        if self.request.projector_rank is not None:
            adapter, kept["projector"] = projector_as_low_rank(adapter, self.run, self.request.projector_rank)
        return adapter, kept

    def _polish(self, static: Session, adapter: StaticAdapter, export_: Export, name: str) -> int:
        """Polish the adapter in place, if that was asked for or its mean lost something; the steps that it took."""
        asked = self.request.polish is not None
        if not self.polish or (not asked and measure(static, export_.check).exact_match >= TOLERATED * export_.score):
            return 0
        self._say(f"{name}: polishing, {self.polish} steps")
        rows = _rows_of(self.training_rows, export_.plan, None, "train")
        start = START if self.run.is_mixture else 1.0  # a plain LoRA is no mean of anything
        polish(static, adapter, rows, self.polish, self.console, start=start)
        return self.polish

    def _run_on_base(self, exports: list[Export]) -> None:
        """What the adapters compute on the base that they are merged into."""
        spec = without_levers(self.recipe.model)
        if self.request.base == "original":
            spec = spec.model_copy(update={"quantization": "none"})
        session = open_model(self.recipe.model_copy(update={"model": spec}))
        static = lora_session(session, read(exports[0].lora))
        for export_ in exports:
            put(static.model, read(export_.lora))
            export_.outputs = supervised_outputs(static, export_.compared)

    def _check(self, difference: float, final: Path) -> None:
        allowed = ROUNDING[self.recipe.model.dtype]
        if not difference <= allowed:
            raise CheckError(
                f"The merged checkpoint does not compute what its adapter computes: the logits differ by "
                f"{difference:.2g} of their size, and rounding explains {allowed:g}. It was removed.",
                where=str(final),
                fix="Export --as lora, which is measured on its own; and report this, with the model's name.",
            )

    def _finish(self, place: Path, made: dict[str, Any]) -> None:
        if not (place / "recipe.yaml").is_file():
            shutil.copyfile(self.folder / "recipe.yaml", place / "recipe.yaml")
        write_json(place / FIDELITY, made)

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    @contextmanager
    def _bar(self, text: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar over bytes; a plain line off a terminal."""
        if not self.console.is_terminal:
            self._say(text)
        columns = (TextColumn(text), BarColumn(), DownloadColumn(binary_units=True))
        disable = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=disable) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def _rows_of(rows: Any, plan: Plan, per_task: int | None, split: str) -> Any:
    """The first rows of every task of an export. Raises UserError if there are none."""
    by_task = indices_by_task(rows)
    chosen = [index for task in plan.shares for index in by_task.get(task, [])[:per_task]]
    if not chosen:
        raise UserError(f"There is no sample of {', '.join(plan.shares)} to measure on.", where=f"split {split}")
    return rows.select(chosen)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
