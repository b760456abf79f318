"""A comparison of methods: same backbone, data, steps and batch; one small JSON file for every run.

A run is never run again while its file is there. Choose the learning rate of a method by `validation`, never by what is
reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import experiments
import tables
import torch
from methods import LEARNING_RATE, Method
from rich.console import Console
from torch.nn.utils.rnn import pad_sequence

from qmixlora import evaluation
from qmixlora.data import IGNORED, Collator, load_conversations
from qmixlora.demo import resolve
from qmixlora.files import write_json
from qmixlora.recipe import Recipe, load_recipe
from qmixlora.session import TunedSession, open_session
from qmixlora.training import make_trainer
from qmixlora.training.callbacks import ProgressDisplay

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
FILL = {"labels": IGNORED, "routing_mask": False, "segments": -1}  # of padding; the tokenizer's own for tokens


@dataclass
class PreparedCollator(Collator):
    """The collator, with every training row made once: tokens and pixels do not change from run to run."""

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        made: dict[int, dict[str, Any]] = {}
        for has_images in (True, False):
            own = [index for index in range(len(rows)) if bool(rows[index]["images"]) == has_images]
            for start in range(0, len(own), 256):
                chunk = own[start : start + 256]
                batch = super().__call__([rows[index] for index in chunk])
                named = ({name: rows[index][name] for name in ("turns", "images")} for index in chunk)  # for messages
                made |= {i: {**n, **own} for i, n, own in zip(chunk, named, self._parted(batch), strict=True)}
        return [made[index] for index in range(len(rows))]

    def _parted(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows of a batch without their padding."""
        names = [name for name in ("input_ids", *FILL) if name in batch]
        parted = []
        for index, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
            row = {name: batch[name][index, :length].clone() for name in names}
            pixels = {"pixels": batch["pixel_values"][index].clone()} if "pixel_values" in batch else {}
            parted.append({**row, **pixels, "task": batch["tasks"][index]})
        return parted

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        fill = {"input_ids": self.processor.tokenizer.pad_token_id, **FILL}
        batch: dict[str, Any] = {
            name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
            for name, value in fill.items()
            if name in rows[0]
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        if pixels := [row["pixels"] for row in rows if "pixels" in row]:
            batch["pixel_values"] = torch.stack(pixels)
        return {**batch, "tasks": [row["task"] for row in rows]}


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
    overrides: tuple[str, ...] = ()

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
        return self.results / f"{run.name}--lr{run.learning_rate:g}--seed{run.seed}.json"


@dataclass(frozen=True)
class Run:
    name: str
    method: Method
    learning_rate: float
    seed: int


@cache
def prepared(model_id: str, file: Path, max_length: int) -> list[dict[str, Any]]:
    """The training rows, ready to be batched."""
    from transformers import AutoProcessor

    collator = PreparedCollator(AutoProcessor.from_pretrained(model_id), max_length)
    return collator.prepare(load_conversations(str(file)))


def training_rows(recipe: Recipe) -> list[dict[str, Any]]:
    return prepared(recipe.model.id, Path(recipe.data.sources[0]), recipe.data.max_length)


def fresh_trainer(comparison: Comparison, run: Run, folder: Path) -> tuple[TunedSession, list[dict[str, Any]], Any]:
    """The session of a run, its rows, and the trainer of both, as the method wants it."""
    recipe = comparison.recipe_of(run)
    rows = training_rows(recipe)
    session = open_session(recipe, tasks_of(rows))
    collator = PreparedCollator(session.collator.processor, recipe.data.max_length)
    session = dataclasses.replace(session, collator=collator)
    trainer = make_trainer(session, rows, None, folder, ProgressDisplay(Console(quiet=True)))
    if run.method.prepare is not None:
        run.method.prepare(trainer)
    return session, rows, trainer


def tasks_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return sorted({task for row in rows for task in ([row["task"]] if isinstance(row["task"], str) else row["task"])})


def trained(comparison: Comparison, run: Run) -> tuple[TunedSession, float]:
    """The session of a run after its training, and the mean training loss."""
    with tempfile.TemporaryDirectory() as folder:
        session, _, trainer = fresh_trainer(comparison, run, Path(folder))
        return session, trainer.train().training_loss


@experiments.undone()
def execute(comparison: Comparison, run: Run) -> dict[str, Any]:
    """Train and evaluate one run; what is kept of it."""
    start = time.monotonic()
    session, loss = trained(comparison, run)
    trainable = sum(p.numel() for p in session.model.parameters() if p.requires_grad)
    seconds = time.monotonic() - start
    return {
        "name": run.name,
        "overrides": list(run.method.overrides),
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "steps": comparison.steps,
        "batch": comparison.batch,
        "trainable_parameters": trainable,
        "train_loss": loss,
        **{split: score(comparison, session, split) for split in ("validation", *comparison.reported)},
        "train_seconds": seconds,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def score(comparison: Comparison, session: TunedSession, split: str) -> dict[str, float]:
    rows = load_conversations(str(comparison.make_data() / f"{split}.json"))
    scores = evaluation.evaluate(session, rows, split)
    tasks = {task: round(own.score, 4) for task, own in scores.tasks.items()}
    return {"mean": round(scores.mean, 5), **tasks}


def run_all(comparison: Comparison, runs: Sequence[Run]) -> None:
    for run in runs:
        file = comparison.file_of(run)
        if file.exists():
            continue
        result = execute(comparison, run)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, result)
        means = "  ".join(f"{split} {result[split]['mean']:.3f}" for split in ("validation", *comparison.reported))
        print(f"{file.stem:60} {means}  {result['train_seconds']:.0f} s", flush=True)


@dataclass(frozen=True)
class Plan:
    """What is run where no names are given: every method at its rates on the first seed, then the finalists at the best
    of theirs on all seeds.
    """

    learning_rates: Mapping[str, tuple[float, ...]]
    finalists: tuple[str, ...]
    seeds: tuple[int, ...]
    learning_rate: float = LEARNING_RATE  # of methods without any of their own


def main(description: str | None, comparison: Comparison, plan: Plan, write_tables: Callable[[], None]) -> None:
    """The command line of a comparison: `run [NAME ...]` and `table`."""
    methods = comparison.methods
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("names", nargs="*", help=", ".join(methods))
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[plan.learning_rate])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--worker", default="0/1", help="this process takes every n-th run: k/n")
    arguments = parser.parse_args()
    if arguments.command == "table":
        write_tables()
        return
    worker, workers = (int(part) for part in arguments.worker.split("/"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    warnings.simplefilter("ignore")
    if arguments.names:
        grid = itertools.product(arguments.seeds, arguments.names, arguments.learning_rate)
        run_all(comparison, [Run(name, methods[name], rate, seed) for seed, name, rate in grid][worker::workers])
        return
    rates = plan.learning_rates
    first = [Run(name, methods[name], rate, 0) for name in methods for rate in rates.get(name, (plan.learning_rate,))]
    run_all(comparison, first[worker::workers])
    best = {name: tables.chosen(own)[0]["learning_rate"] for name, own in tables.read(comparison.results).items()}
    more = [Run(n, methods[n], best[n], seed) for seed in plan.seeds[1:] for n in plan.finalists if n in best]
    run_all(comparison, more[worker::workers])
