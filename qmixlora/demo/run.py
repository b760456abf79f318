"""The demonstration: backbone, data, training, evaluation, one table."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from qmixlora.data import load_conversations
from qmixlora.evaluation import blind_baseline, evaluate, write_json
from qmixlora.recipe import load_recipe
from qmixlora.session import open_run
from qmixlora.training import clear_disk_errors, load_data, train

from .backbone import backbone_folder, make_backbone

RECIPE = "tiny-cpu"


def run_demo(out: Path, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Everything end to end in `out`: `data/`, `run/`, `summary.json`; returns the summary.

    The summary holds mean exact match on the test split as `backbone` (before tuning), `blind` (the best answer
    without looking) and `tuned`, the same on the tasks held out from training, the results per task, and `seconds`.
    A run that an earlier demo left in `out` is replaced; backbone and data set are kept.

    Raises:
        UserError: as the verbs it is made of.
    """
    from . import resolve

    start = time.monotonic()
    with clear_disk_errors(out):
        recipe = load_recipe(RECIPE, [*overrides, f"train.output={out / 'run'}"])
        recipe = resolve(recipe, out / "data", console)
        shutil.rmtree(recipe.train.output, ignore_errors=True)
        console.print(f"[bold]Training[/bold] MixLoRA on the NF4 backbone: {RECIPE}, in {recipe.train.output}")
        folder = train(recipe, console=console)
        session = open_run(folder)
        rows = {
            "test": load_data(recipe.data, "test"),
            "held_out": load_conversations(str(Path(recipe.data.train).with_name("held_out.json"))),
        }
        console.print("[bold]Evaluating[/bold] by generation, before and after")
        batch_size, new_tokens = recipe.train.eval_batch_size, recipe.train.max_new_tokens
        results: dict[str, dict[str, Any]] = {"backbone": {}, "tuned": {}, "blind": {}}
        train_rows = load_data(recipe.data, "train")
        for split, split_rows in rows.items():
            for name in ("backbone", "tuned"):
                bare = session.model.disable_adapter() if name == "backbone" else contextlib.nullcontext()
                with bare:
                    results[name][split] = evaluate(
                        session.model,
                        session.collator,
                        split_rows,
                        split=split,
                        batch_size=batch_size,
                        max_new_tokens=new_tokens,
                    )
            results["blind"][split] = blind_baseline(train_rows, split_rows, split)
        write_json(folder / "evaluation.json", results["tuned"]["test"])
        summary = {
            **{name: result["test"]["mean_exact_match"] for name, result in results.items()},
            "held_out": {name: result["held_out"]["mean_exact_match"] for name, result in results.items()},
            "tasks": {name: result["test"]["tasks"] for name, result in results.items()},
            "seconds": time.monotonic() - start,
        }
        write_json(out / "summary.json", summary)
    console.print(_table(results))
    console.print(
        f"Exact match on the test split, {summary['seconds']:.0f} s in all. Talk to it: "
        f"[bold]qmixlora chat {folder} --image {Path(recipe.data.train).parent / 'images' / 'test-00000.png'}[/bold]",
        soft_wrap=True,
    )
    return summary


def make_backbone_with_progress(console: Console) -> Path:
    """`make_backbone` in its cache, with a progress bar (a plain line off a terminal)."""
    folder = backbone_folder()
    if (folder / "config.json").is_file():
        return folder
    console.print(f"[bold]Making the backbone[/bold] from scratch, once (about a minute on two cores): {folder}")
    columns = (TextColumn("captions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and done % (total // 4) == 0:
                console.print(f"  step {done}/{total}", highlight=False)

        return make_backbone(folder, show)


def _table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Exact match per task")
    table.add_column("task")
    for column in ("backbone", "tuned", "blind"):
        table.add_column(column, justify="right")
    for split, label in (("test", "mean"), ("held_out", "mean, never trained")):
        tasks = results["tuned"][split]["tasks"]
        for task in tasks:
            table.add_row(task, *(f"{results[name][split]['tasks'][task]['exact_match']:.2f}" for name in results))
        means = (f"[bold]{results[name][split]['mean_exact_match']:.2f}" for name in results)
        table.add_row(f"[bold]{label}", *means, end_section=True)
    return table
