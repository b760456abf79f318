"""The command line of a comparison: many runs one after another, within the time that there is."""

from __future__ import annotations

import argparse
import itertools
import os
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import tables
import torch
from comparison import Comparison, Run, best_run, execute
from progress import OutOfTimeError

from qmixlora.files import write_json


def run_all(comparison: Comparison, runs: Sequence[Run], deadline: float = float("inf")) -> None:
    """Execute the runs that there is no file of, and that can end before the deadline by what such runs have taken. One
    that fails does not keep the others from it. Raises SystemExit after the last, where one has.
    """
    failed = []
    for run in runs:
        file = comparison.file_of(run)
        if file.exists():
            continue
        left, needed = deadline - time.monotonic(), expected_seconds(comparison, run)
        if needed > left:
            print(f"{file.stem}: not begun, it takes {needed / 60:.0f} min and {left / 60:.0f} are left", flush=True)
            continue
        print(f"{file.stem}: begun {time.strftime('%H:%M')}", flush=True)
        try:
            result = execute(comparison, run, deadline)
        except OutOfTimeError as error:
            print(f"{file.stem}: given up, {error}", flush=True)
            continue
        except Exception:
            print(f"{file.stem}: failed\n{traceback.format_exc()}", flush=True)
            failed.append(file.stem)
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, result)
        splits = (split for split in ("validation", *comparison.reported) if split in result)
        means = "  ".join(f"{split} {result[split]['mean']:.3f}" for split in splits)
        print(f"{file.stem:60} {means}  {result['train_seconds']:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} failed: {', '.join(failed)}")


def expected_seconds(comparison: Comparison, run: Run) -> float:
    """The longest that a run of this method has taken, or else of any; 0 where none is kept."""
    kept = tables.read(comparison.results)
    seconds = {
        name: max(own["train_seconds"] + own.get("evaluation_seconds", 0.0) for runs in rates.values() for own in runs)
        for name, rates in kept.items()
    }
    return seconds.get(run.name, max(seconds.values(), default=0.0))


@dataclass(frozen=True)
class Plan:
    """What is run where no names are given: every method at its rates on the first seed, then the finalists at the best
    of theirs on all seeds.
    """

    learning_rates: Mapping[str, tuple[float, ...]]
    finalists: tuple[str, ...]
    seeds: tuple[int, ...]


def main(description: str | None, comparison: Comparison, plan: Plan, write_tables: Callable[[], None]) -> None:
    """The command line of a comparison: `run [NAME ...]` and `table`."""
    methods = comparison.methods
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("names", nargs="*", help=", ".join(methods))
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[comparison.learning_rate])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--worker", default="0/1", help="this process takes every n-th run: k/n")
    parser.add_argument("--budget", type=float, default=float("inf"), help="minutes: begin no run that takes longer")
    arguments = parser.parse_args()
    if arguments.command == "table":
        write_tables()
        return
    deadline = time.monotonic() + 60 * arguments.budget
    worker, workers = (int(part) for part in arguments.worker.split("/"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    warnings.simplefilter("ignore")
    if arguments.names:
        grid = itertools.product(arguments.seeds, arguments.names, arguments.learning_rate)
        run_all(
            comparison, [Run(name, methods[name], rate, seed) for seed, name, rate in grid][worker::workers], deadline
        )
        return
    rates = plan.learning_rates
    first = [
        Run(name, methods[name], rate, 0) for name in methods for rate in rates.get(name, (comparison.learning_rate,))
    ]
    run_all(comparison, first[worker::workers], deadline)
    more = [best_run(comparison, name, seed) for seed in plan.seeds[1:] for name in plan.finalists]
    run_all(comparison, more[worker::workers], deadline)
