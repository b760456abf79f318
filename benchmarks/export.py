"""What an exported adapter keeps of the live mixture: the frontier over how a run is trained and how long polished.

    python benchmarks/export.py run [--on embedded|real] [NAME ...] [--seeds 0] [--polish STEPS ...]
    python benchmarks/export.py table                          docs/export.md

One JSON file per method and seed in results/export/ or results/export-real/. Runs are those of method.py or real.py,
each at the best of its learning rates; they are trained where they are not kept. `fresh` is the control: a LoRA of the
same rank from nothing, on each task alone, for as many steps as polishing took.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
import experiments
import tables
from comparison import Comparison, best_run, trained
from methods import GONE
from on import COMPARISONS, add_on, results_of, suffixed
from prepared import PreparedCollator, training_rows, with_answers_of

from qmixlora.data import indices_by_task, load_conversations, only_tasks
from qmixlora.evaluation import evaluate
from qmixlora.export.calibration import calibrate
from qmixlora.export.polish import START, polish
from qmixlora.export.static import Learned, StaticAdapter, learned_by, lora_session, put
from qmixlora.files import write_json
from qmixlora.session import Session, make_collator

POLISH = {"mixlora": (50, 100, 200, 300), "fresh": (100, 200, 300, 1000)}  # (100, 300) for the others
CALIBRATION = 5000  # samples that C_t is the mean over
NAMES = (
    "mixlora", "task_mix=0.1", "task_mix=0.3", "task_mix=0.5", "route_on=task", "route_on=instruction", "gate=dense",
    "gate=straight_through", "lora-r16", "fresh",
)  # fmt: skip
NAMES_ON_REAL = ("mixlora", "router=model", "gate=dense,E=16,R=16", "lora-r16", "fresh")


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


@experiments.undone()
def execute(comparison: Comparison, name: str, seed: int, polish_steps: Sequence[int]) -> dict[str, Any]:
    start = time.monotonic()
    is_fresh = name == "fresh"
    run = best_run(comparison, "mixlora" if is_fresh else name, seed)
    session = trained(comparison, run).session
    session = replace(session, collator=make_collator(session.recipe, session.collator.processor))
    test = load_conversations(str(comparison.make_data() / "test.json"))
    tasks = list(indices_by_task(test))
    learned = learned_by(session.model, session.anatomy.projector_targets)
    result: dict[str, Any] = {"name": name, "seed": seed, "date": time.strftime("%Y-%m-%d"), "start": START}
    result |= {"learning_rate": run.learning_rate, "exported": {}}
    if not is_fresh:
        result["live"] = with_mean(scores(session, test))
    if is_fresh:
        adapters = dict.fromkeys(tasks, fresh_adapter(learned))
    elif learned.is_mixture:
        rows = load_conversations(str(comparison.make_data() / "train.json")).shuffle(seed=0)
        mean_LTEF = calibrate(session, rows.select(range(min(CALIBRATION, len(rows)))), tasks)
        adapters = {task: learned.adapter(mean_LTEF[:, index]) for index, task in enumerate(tasks)}
    else:
        adapters = dict.fromkeys(tasks, learned.adapter(learned.identity()))
    static = lora_session(session, adapters[tasks[0]], trained=set(learned.pools))
    prepared = training_rows(session.recipe)
    by_task = {task: with_answers_of(prepared, task) for task in tasks}
    polished = replace(static, collator=PreparedCollator(static.collator.processor, static.recipe.data.max_length))
    for steps in (0, *polish_steps):
        exact_match: dict[str, float] = {}
        for task in tasks:
            put(static.model, adapters[task])
            if steps:
                polish(polished, adapters[task], by_task[task], steps, Console(quiet=True))
            exact_match |= scores(static, only_tasks(test, [task], "test"))
        result["exported"][str(steps)] = with_mean(exact_match)
        print(f"{name:24} {steps:5} steps  {result['exported'][str(steps)]['mean']:.3f}", flush=True)
    return {**result, "seconds": time.monotonic() - start}


def write_tables() -> None:
    for on, names in (("embedded", (*NAMES, *GONE)), ("real", NAMES_ON_REAL)):
        files = sorted(results_of("export", on).glob("*.json"))
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in files]
        tables.write_export(suffixed("frontier", on), runs, names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--polish", type=int, nargs="+", help="steps for each task")
    parser.add_argument("--threads", type=int, default=1)
    add_on(parser)
    arguments = parser.parse_intermixed_args()  # names may stand behind options
    if arguments.command == "table":
        write_tables()
        return
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    results = results_of("export", arguments.on)
    for seed in arguments.seeds:
        for name in arguments.names or (NAMES if arguments.on == "embedded" else NAMES_ON_REAL):
            file = results / f"{name}--start{START:g}--seed{seed}.json"
            if not file.exists():
                polish_steps = arguments.polish or POLISH.get(name, (100, 300))
                result = execute(COMPARISONS[arguments.on], name, seed, polish_steps)
                results.mkdir(parents=True, exist_ok=True)
                write_json(file, result)


if __name__ == "__main__":
    main()
