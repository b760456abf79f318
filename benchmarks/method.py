"""What the mixture is worth: LoRA and mixtures on the embedded backbone, same data, steps, batch and scale.

    python benchmarks/method.py run [--worker 0/2]                                what is planned in methods.py
    python benchmarks/method.py run NAME ... [--learning-rate LR ...] [--seeds 0 1]
    python benchmarks/method.py table                                             docs/results.md

Each run is one small JSON file in benchmarks/results/method/ and is never run again while its file is there. Choose
the learning rate of a method by `validation`, never by what is reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from rich.console import Console
from torch.nn.utils.rnn import pad_sequence

from qmixlora import evaluation
from qmixlora.data import IGNORED, Collator, load_conversations
from qmixlora.demo import resolve
from qmixlora.demo.dataset import make_dataset
from qmixlora.files import write_json
from qmixlora.recipe import Recipe, load_recipe
from qmixlora.session import Session, TunedSession, open_session
from qmixlora.training import make_trainer
from qmixlora.training.callbacks import ProgressDisplay

sys.path.insert(0, str(Path(__file__).parent))
import experiments
import tables
from methods import CONTROLS, LEARNING_RATE, LEARNING_RATES, METHODS, SEEDS, Method

RESULTS = Path(__file__).parent / "results" / "method"
DATA = Path(tempfile.gettempdir()) / "qmixlora-benchmark-data"
SPLITS = {"train": 2500, "validation": 40, "test": 100}  # samples per task: a larger test than the demo's
REPORTED = ("test", "paraphrased", "held_out")
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
STEPS, BATCH = 1000, 32
COMMON = (
    f"train.max_steps={STEPS}",
    f"train.micro_batch_size={BATCH}",
    "train.checkpointing.enabled=false",  # the same numbers, sooner
    "train.eval_every=null",
    "train.save_every=null",
    "train.log_every=100",
)


@dataclass
class PreparedCollator(Collator):
    """The collator, with every training row made once: tokens and pixels do not change from run to run."""

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        made = []
        for start in range(0, len(rows), 256):
            batch = super().__call__([rows[index] for index in range(start, min(start + 256, len(rows)))])
            lengths = batch["attention_mask"].sum(dim=1).tolist()
            for index, length in enumerate(lengths):
                row = {name: batch[name][index, :length].clone() for name in ("input_ids", "labels", "routing_mask")}
                made.append({**row, "pixels": batch["pixel_values"][index].clone(), "task": batch["tasks"][index]})
        return made

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        fill = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": IGNORED, "routing_mask": False}
        batch: dict[str, Any] = {
            name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
            for name, value in fill.items()
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return {**batch, "pixel_values": torch.stack([r["pixels"] for r in rows]), "tasks": [r["task"] for r in rows]}


@dataclass(frozen=True)
class Run:
    name: str
    method: Method
    learning_rate: float
    seed: int

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.name}--lr{self.learning_rate:g}--seed{self.seed}.json"


@cache
def data_folder() -> Path:
    return make_dataset(DATA, splits=SPLITS)


@cache
def prepared(model_id: str) -> list[dict[str, Any]]:
    from transformers import AutoProcessor

    collator = PreparedCollator(AutoProcessor.from_pretrained(model_id), 128)
    return collator.prepare(load_conversations(str(data_folder() / "train.json")))


def recipe_of(run: Run) -> Recipe:
    overrides = [*COMMON, f"train.learning_rate={run.learning_rate}", f"train.seed={run.seed}", *run.method.overrides]
    return resolve(load_recipe("tiny-cpu", overrides), data_folder(), Console(stderr=True))


def trained(run: Run) -> tuple[TunedSession, float]:
    """The session of a run after its training, and the mean training loss."""
    recipe = recipe_of(run)
    rows = prepared(recipe.model.id)
    session = open_session(recipe, sorted({row["task"] for row in rows}))
    collator = PreparedCollator(session.collator.processor, recipe.data.max_length)
    session = dataclasses.replace(session, collator=collator)
    with tempfile.TemporaryDirectory() as folder:
        display = ProgressDisplay(Console(quiet=True))
        trainer = make_trainer(session, rows, None, Path(folder), display)
        if run.method.prepare is not None:
            run.method.prepare(trainer)
        loss = trainer.train().training_loss
    return session, loss


@experiments.undone()
def execute(run: Run) -> dict[str, Any]:
    """Train and evaluate one run; what is kept of it."""
    start = time.monotonic()
    session, loss = trained(run)
    trainable = sum(p.numel() for p in session.model.parameters() if p.requires_grad)
    seconds = time.monotonic() - start
    return {
        "name": run.name,
        "overrides": list(run.method.overrides),
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "steps": STEPS,
        "batch": BATCH,
        "trainable_parameters": trainable,
        "train_loss": loss,
        **{split: score(session, split) for split in ("validation", *REPORTED)},
        "train_seconds": seconds,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def answered(session: Session, rows: Dataset, split: str) -> evaluation.Scores:
    """The scores of a session's answers, in larger batches and with shorter answers than a recipe allows for."""
    return evaluation.score(rows, evaluation.answer_rows(session, rows, batch_size=200, max_new_tokens=6), split)


def score(session: Session, split: str) -> dict[str, float]:
    scores = answered(session, load_conversations(str(data_folder() / f"{split}.json")), split)
    tasks = {task: round(own.score, 4) for task, own in scores.tasks.items()}
    return {"mean": round(scores.mean, 5), **tasks}


def run_all(runs: Sequence[Run]) -> None:
    for run in runs:
        if run.file.exists():
            continue
        result = execute(run)
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_json(run.file, result)
        means = "  ".join(f"{split} {result[split]['mean']:.3f}" for split in ("validation", *REPORTED))
        print(f"{run.file.stem:60} {means}  {result['train_seconds']:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("names", nargs="*", help=", ".join(METHODS))
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[LEARNING_RATE])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--worker", default="0/1", help="this process takes every n-th run: k/n")
    arguments = parser.parse_args()
    if arguments.command == "table":
        tables.write(RESULTS, RESULTS.with_name("speed"), list(METHODS), CONTROLS)
        return
    worker, workers = (int(part) for part in arguments.worker.split("/"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    warnings.simplefilter("ignore")
    if arguments.names:
        grid = itertools.product(arguments.seeds, arguments.names, arguments.learning_rate)
        run_all([Run(name, METHODS[name], rate, seed) for seed, name, rate in grid][worker::workers])
        return
    first = [
        Run(name, METHODS[name], rate, 0) for name in METHODS for rate in LEARNING_RATES.get(name, (LEARNING_RATE,))
    ]
    run_all(first[worker::workers])
    best = {name: tables.chosen(rates)[0]["learning_rate"] for name, rates in tables.read(RESULTS).items()}
    more = [Run(name, METHODS[name], best[name], seed) for seed in SEEDS[1:] for name in CONTROLS if name in best]
    run_all(more[worker::workers])


if __name__ == "__main__":
    main()
