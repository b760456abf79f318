"""What an exported adapter keeps of the live mixture: the frontier over how a run is trained and how long polished.

    python benchmarks/export.py run [NAME ...] [--seeds 0]     one JSON file per method and seed in results/export/
    python benchmarks/export.py table                          docs/export.md

Methods are those of methods.py, trained as in method.py (kept in the temporary folder, so that a run is trained once).
`fresh` is the control: a LoRA of the same rank from nothing, on each task alone, for as many steps as polishing took.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
import tables
from comparison import PreparedCollator, Run, trained, training_rows
from method import EMBEDDED, data_folder
from methods import METHODS

from qmixlora.data import indices_by_task, load_conversations, only_tasks
from qmixlora.evaluation import evaluate
from qmixlora.export.calibration import calibrate
from qmixlora.export.polish import START, polish
from qmixlora.export.static import Learned, StaticAdapter, learned_by, lora_session, put
from qmixlora.files import write_json
from qmixlora.session import Session, open_tuned_run

RESULTS = Path(__file__).parent / "results" / "export"
RUNS = Path(tempfile.gettempdir()) / "qmixlora-benchmark-runs"
RATES = {"mixlora": 3e-3, "lora-r16": 1.5e-3, "route_on=task": 3e-3}  # the best of results/method; 2e-3 for the others
POLISH = {"mixlora": (50, 100, 200, 300), "fresh": (100, 200, 300, 1000)}  # (100, 300) for the others
CALIBRATION = 5000  # samples that C_t is the mean over
NAMES = (
    "mixlora", "task_mix=0.1", "task_mix=0.3", "task_mix=0.5", "route_on=task", "route_on=instruction", "gate=dense",
    "gate=straight_through", "pairing=independent", "lora-r16", "fresh",
)  # fmt: skip


def run_folder(name: str, seed: int) -> Path:
    """A trained run, as an ordinary run folder."""
    folder = RUNS / f"{name}--seed{seed}"
    if not (folder / "recipe.yaml").is_file():
        run = Run(name, METHODS[name], RATES.get(name, 2e-3), seed)
        session, _ = trained(EMBEDDED, run)
        session.model.save_pretrained(str(folder / "adapter"))
        (folder / "recipe.yaml").write_text(EMBEDDED.recipe_of(run).to_yaml(), encoding="utf-8")
    return folder


def scores(session: Session, rows: Dataset) -> dict[str, float]:
    return {task: own.score for task, own in evaluate(session, rows, "test").tasks.items()}


def with_mean(by_task: dict[str, float]) -> dict[str, float]:
    return {"mean": sum(by_task.values()) / len(by_task), **by_task}


def fresh_adapter(learned: Learned) -> StaticAdapter:
    """A LoRA as PEFT makes it, with the run's projector left out: the base's own."""
    updates = {}
    for layer, update in learned.adapter(learned.identity()).updates.items():
        down_KI = torch.empty_like(update.down_KI)
        torch.nn.init.kaiming_uniform_(down_KI, a=5**0.5)
        updates[layer] = replace(update, down_KI=down_KI, up_OK=torch.zeros_like(update.up_OK))
    return StaticAdapter(updates, learned.originals)


def execute(name: str, seed: int) -> dict[str, Any]:
    start = time.monotonic()
    is_fresh = name == "fresh"
    session = open_tuned_run(run_folder("mixlora" if is_fresh else name, seed))
    test = load_conversations(str(data_folder() / "test.json"))
    tasks = list(indices_by_task(test))
    learned = learned_by(session.model)
    result: dict[str, Any] = {"name": name, "seed": seed, "date": time.strftime("%Y-%m-%d"), "start": START}
    result["exported"] = {}
    if not is_fresh:
        result["live"] = with_mean(scores(session, test))
    if is_fresh:
        adapters = dict.fromkeys(tasks, fresh_adapter(learned))
    elif learned.is_mixture:
        rows = load_conversations(str(data_folder() / "train.json")).shuffle(seed=0).select(range(CALIBRATION))
        mean_LTEF = calibrate(session, rows, tasks)
        adapters = {task: learned.adapter(mean_LTEF[:, index]) for index, task in enumerate(tasks)}
    else:
        adapters = dict.fromkeys(tasks, learned.adapter(learned.identity()))
    static = lora_session(session, adapters[tasks[0]], trained=set(learned.pools))
    by_task: dict[str, list[Any]] = {}
    for row in training_rows(session.recipe):
        by_task.setdefault(row["task"], []).append(row)
    collator = PreparedCollator(static.collator.processor, static.recipe.data.max_length)
    for steps in (0, *POLISH.get(name, (100, 300))):
        exact_match: dict[str, float] = {}
        for task in tasks:
            put(static.model, adapters[task])
            if steps:
                polish(replace(static, collator=collator), adapters[task], by_task[task], steps, Console(quiet=True))
            exact_match |= scores(static, only_tasks(test, [task], "test"))
        result["exported"][str(steps)] = with_mean(exact_match)
        print(f"{name:24} {steps:5} steps  {result['exported'][str(steps)]['mean']:.3f}", flush=True)
    return {**result, "seconds": time.monotonic() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.command == "table":
        tables.write_export(
            [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))], NAMES
        )
        return
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    for seed in arguments.seeds:
        for name in arguments.names:
            file = RESULTS / f"{name}--start{START:g}--seed{seed}.json"
            if not file.exists():
                result = execute(name, seed)
                RESULTS.mkdir(parents=True, exist_ok=True)
                write_json(file, result)


if __name__ == "__main__":
    main()
