"""A comparison of methods: same backbone, data, steps and batch; one small JSON file for every run.

A run is never run again while its file is there. Choose the learning rate of a method by `validation`, never by what is
reported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import experiments
import rivals
import tables
from methods import Method
from prepared import PreparedCollator, Row, tasks_of, training_rows
from progress import Phase, Steps
from rich.console import Console
from transformers import TrainerCallback

from qmixlora import evaluation
from qmixlora.data import indices_by_task, load_conversations, only_tasks
from qmixlora.demo import resolve
from qmixlora.files import replacing, write_json
from qmixlora.mixlora.routing_record import FILE as ROUTING
from qmixlora.recipe import Recipe, load_recipe
from qmixlora.session import TunedSession, open_session, open_tuned_run
from qmixlora.training import make_trainer
from qmixlora.training.callbacks import ProgressDisplay, RoutingLog

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Comparison:
    """What all runs of a table share. `reported` are splits beside `validation`, files of the data set's folder."""

    recipe: str
    results: Path
    make_data: Callable[[], Path]
    methods: Mapping[str, Method]
    reported: tuple[str, ...]
    steps: int
    batch: int
    learning_rate: float  # of methods for which none was tried
    overrides: tuple[str, ...] = ()
    runs: Path = Path(tempfile.gettempdir()) / "qmixlora-benchmark-runs"  # folders of those that were trained

    def recipe_of(self, run: Run) -> Recipe:
        overrides = [
            f"train.max_steps={self.steps}",
            f"train.micro_batch_size={self.batch}",
            "train.checkpointing.enabled=false",  # the same numbers, sooner
            "train.eval_every=null",
            "train.save_every=null",
            "train.log_every=100",
            f"train.learning_rate={run.learning_rate}",
            f"train.seed={run.seed}",
            *self.overrides,
            *run.method.overrides,
        ]
        return resolve(load_recipe(self.recipe, overrides), self.make_data(), Console(stderr=True))

    def file_of(self, run: Run) -> Path:
        return self.results / f"{run.stem}.json"

    def folder_of(self, run: Run) -> Path:
        return self.runs / self.results.name / run.stem


@dataclass(frozen=True)
class Run:
    name: str
    method: Method
    learning_rate: float
    seed: int

    @property
    def stem(self) -> str:
        return f"{self.name}--lr{self.learning_rate:g}--seed{self.seed}"


def digest_of(model: str) -> str:
    """What tells backbones apart that the same commands have made on other machines."""
    with (Path(model) / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def fresh_trainer(
    session: TunedSession, rows: Sequence[Row], method: Method, folder: Path, callbacks: Sequence[TrainerCallback] = ()
) -> Any:
    """A trainer of some rows, as the method wants it."""
    trainer = make_trainer(session, rows, None, folder, ProgressDisplay(Console(quiet=True)))
    if session.recipe.train.gradient_accumulation > 1:  # `data.group_by_length: step`, of rows that are prepared
        trainer.lengths, trainer.within_steps = [len(row["input_ids"]) for row in rows], True
    for callback in callbacks:
        trainer.add_callback(callback)
    if method.prepare is not None:
        method.prepare(trainer)
    return trainer


def fresh_session(comparison: Comparison, run: Run) -> tuple[TunedSession, list[Row]]:
    """The session of a run and its rows, ready to be batched."""
    recipe = comparison.recipe_of(run)
    rows = training_rows(recipe)
    session = open_session(recipe, tasks_of(rows))
    collator = PreparedCollator(session.collator.processor, recipe.data.max_length)
    return dataclasses.replace(session, collator=collator), rows


@dataclass(frozen=True)
class Trained:
    """A session after its training, with what training was, and on what backbone."""

    session: TunedSession
    backbone: str
    trainable_parameters: int
    train_loss: float
    train_seconds: float


def trained(comparison: Comparison, run: Run, deadline: float = float("inf")) -> Trained:
    """Train a run. One that the package can open again is kept as a run folder, and not trained again.

    Raises OutOfTimeError where it would not end before the deadline.
    """
    folder, facts = comparison.folder_of(run), comparison.folder_of(run) / "trained.json"
    recipe = comparison.recipe_of(run)
    backbone = digest_of(recipe.model.id)
    if facts.is_file() and (folder / "recipe.yaml").read_text(encoding="utf-8") == recipe.to_yaml():
        kept = json.loads(facts.read_text(encoding="utf-8"))
        if kept.get("backbone") == backbone:
            return Trained(open_tuned_run(folder), **kept)
    start, method = time.monotonic(), run.method
    session, rows = fresh_session(comparison, run)
    tasks, phase = tasks_of(rows), Phase("training, step", session.recipe.train.max_steps or comparison.steps, deadline)
    with tempfile.TemporaryDirectory() as scratch:
        if method.by_task:
            loss = rivals.train_by_task(session, rows, Path(scratch), phase)
        else:
            callbacks: list[TrainerCallback] = [Steps(phase)]
            if method.is_plain and session.recipe.adapter.method == "mixlora":
                callbacks.append(RoutingLog(session.model, tasks, Path(scratch)))
            loss = fresh_trainer(session, rows, method, Path(scratch), callbacks).train().training_loss
        trainable = sum(p.numel() for p in session.model.parameters() if p.requires_grad)
        own = {
            "backbone": backbone,
            "trainable_parameters": trainable * (len(tasks) if method.by_task else 1),
            "train_loss": loss,
            "train_seconds": time.monotonic() - start,
        }
        if method.join is not None:
            method.join(session, tasks)
        if method.is_plain:
            with replacing(folder) as temporary:
                session.model.save_pretrained(str(temporary / "adapter"))
                (temporary / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
                if (record := Path(scratch) / ROUTING).is_file():
                    shutil.copy(record, temporary)
                write_json(temporary / facts.name, own)
    return Trained(session, **own)


@experiments.undone()
def execute(comparison: Comparison, run: Run, deadline: float = float("inf")) -> dict[str, Any]:
    """Train and evaluate one run; what is kept of it. Raises OutOfTimeError as `trained`."""
    learned, start = trained(comparison, run, deadline), time.monotonic()
    splits = ("validation", *comparison.reported)
    scores = {split: score(comparison, run, learned.session, split, deadline) for split in splits}
    return {
        "name": run.name,
        "overrides": list(run.method.overrides),
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "steps": learned.session.recipe.train.max_steps,
        "batch": comparison.batch,
        "backbone": learned.backbone,
        "trainable_parameters": learned.trainable_parameters,
        "train_loss": learned.train_loss,
        **{split: own for split, own in scores.items() if own is not None},
        "train_seconds": learned.train_seconds,
        "evaluation_seconds": time.monotonic() - start,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def score(
    comparison: Comparison, run: Run, session: TunedSession, split: str, deadline: float
) -> dict[str, float] | None:
    """The mean score of every task, and of all; None where nobody answers a task."""
    rows = load_conversations(str(comparison.make_data() / f"{split}.json"))
    phase = Phase(f"{split}, sample", len(rows), deadline)
    if run.method.by_task and run.method.join is None:
        tasks: dict[str, float] = {}
        for task in indices_by_task(rows):
            if task not in session.model.peft_config:
                return None
            session.model.set_adapter(task)
            tasks[task] = evaluation.evaluate(session, only_tasks(rows, [task], split), split).mean
            phase(len(tasks) * len(rows) // len(indices_by_task(rows)))
    else:
        scores = evaluation.evaluate(session, rows, split, phase)
        tasks = {task: own.score for task, own in scores.tasks.items()}
    rounded = {task: round(own, 4) for task, own in tasks.items()}
    return {"mean": round(statistics.fmean(tasks.values()), 5), **rounded}


def best_run(comparison: Comparison, name: str, seed: int = 0) -> Run:
    """A run of a method at the best of the learning rates that were tried."""
    kept = tables.read(comparison.results)
    rate = tables.chosen(kept[name])[0]["learning_rate"] if name in kept else comparison.learning_rate
    return Run(name, comparison.methods[name], rate, seed)
