"""The demonstration: backbone, data, training, evaluation, export, one table."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qmixlora.data import load_conversations, load_split
from qmixlora.errors import UserError, typed
from qmixlora.evaluation import Scores, TaskScore, blind_baseline, evaluate, write_results
from qmixlora.export import Request, export
from qmixlora.export.targets import Form
from qmixlora.files import check_can_be_written, clear_disk_errors, write_json
from qmixlora.progress import progress
from qmixlora.recipe import MADE_HERE, Recipe, load_recipe, load_run_recipe
from qmixlora.report.page import refresh_report
from qmixlora.session import Session, open_tuned_run
from qmixlora.training import train_within_memory
from qmixlora.training.history import RECIPE
from qmixlora.training.owner import is_empty, owned
from qmixlora.training.run import FULL_DISK

EXPORTS: dict[Form, tuple[str, str]] = {"lora": ("exported", "LoRA"), "merged": ("merged", "merged checkpoint")}
Results = dict[str, dict[str, Scores]]  # by column of the table, and by split


@dataclass(frozen=True)
class Demonstration:
    """A recipe that is run end to end, and the forms that every task is exported in."""

    recipe: str
    forms: tuple[Form, ...]


ON_EMBEDDED = Demonstration("tiny-cpu", ("lora", "merged"))
ON_REAL = Demonstration("real-cpu", ("lora",))  # a merged checkpoint has 0.6 GB, and there are fifteen tasks


def run_demo(
    out: Path, overrides: Sequence[str], console: Console, demonstration: Demonstration = ON_EMBEDDED
) -> dict[str, Any]:
    """Run a recipe end to end in `out`: `data/`, `run/` with its `exports/`, `summary.json`; returns the summary.

    The summary holds mean exact match on the test split as `backbone` (before tuning), `blind` (the best answer
    without looking), `tuned`, `exported` (every task through its own plain LoRA) and `merged` (through its own merged
    checkpoint); all but the last two on the tasks held out from training; the results per task; and `seconds`.
    A run that an earlier demo left in `out` is replaced; backbone and data set are kept.

    Raises:
        UserError: as the verbs that it runs; or `out/run` is there, and no demo's.
        OSError: nothing can be written in `out`.
    """
    from . import resolve

    start = time.monotonic()
    check_can_be_written(out)
    recipe = load_recipe(demonstration.recipe, [*overrides, f"train.output={out / 'run'}"])
    _make_room(recipe, out)
    with clear_disk_errors(out, FULL_DISK):
        recipe = resolve(recipe, out / "data", console)
        name = demonstration.recipe
        console.print(f"[bold]Training[/bold] MixLoRA on the NF4 backbone: {name}, in {escape(recipe.train.output)}")
        folder = train_within_memory(recipe, console=console)
        results = _evaluated(folder, console)
        write_results(folder, results["tuned"]["test"])
        results |= _exported(folder, demonstration.forms, console)
        summary = {
            **{name: splits["test"].mean for name, splits in results.items()},
            "held_out": {name: splits["held_out"].mean for name, splits in results.items() if "held_out" in splits},
            "tasks": {name: splits["test"].to_dict()["tasks"] for name, splits in results.items()},
            "seconds": time.monotonic() - start,
        }
        write_json(out / "summary.json", summary)
    console.print(_table(results))
    console.print(refresh_report(folder), markup=False, highlight=False, soft_wrap=True)
    image = load_split(recipe.data, "test")[0]["images"][0]["path"]
    console.print(
        f"Exact match on the test split, {summary['seconds']:.0f} s in all; data, run, exports and summary.json are in "
        f"{escape(str(out))}.\nNext: [bold]{escape(typed('chat', folder, '--image', image))}[/bold] "
        "(ask it about an image)",
        highlight=False,
        soft_wrap=True,
    )
    return summary


def _make_room(recipe: Recipe, out: Path) -> None:
    """Remove the run that an earlier demo left, which has learned from the data that this one learns from. Raises
    UserError if another one, or anything else, is in its place, or if it is still going on.
    """
    folder, data = Path(recipe.train.output), recipe.data.train
    if is_empty(folder):
        return
    with owned(folder):
        own = str(out / "data" / "train.json") if data in MADE_HERE else str(data)
        former = str(load_run_recipe(folder).data.train) if (folder / RECIPE).is_file() else ""
        if not former or Path(former).resolve() != Path(own).resolve():
            raise UserError(
                "There is something in the place of the demo's run that no demo has made.",
                where=str(folder),
                fix="Choose another --out, or move it away.",
            )
        shutil.rmtree(folder)


def _evaluated(folder: Path, console: Console) -> Results:
    """The scores of `backbone`, `tuned` and `blind` on every split."""
    console.print("[bold]Evaluating[/bold] by generation, before and after")
    session = open_tuned_run(folder)
    data = session.recipe.data
    splits = {
        "test": load_split(data, "test"),
        "held_out": load_conversations(str(Path(data.sources[0]).with_name("held_out.json"))),
    }
    training_rows = load_split(data, "train")
    results: Results = {"backbone": {}, "tuned": {}, "blind": {}}
    for split, rows in splits.items():
        for name in ("backbone", "tuned"):
            with session.without_adapter() if name == "backbone" else contextlib.nullcontext():
                results[name][split] = _scored(session, rows, split, console)
        results["blind"][split] = blind_baseline(training_rows, rows, split)
    return results


def _scored(session: Session, rows: Dataset, split: str, console: Console) -> Scores:
    with progress(f"answers, split {split}", console) as tell:
        return evaluate(session, rows, split, lambda done: tell(done, len(rows))).with_image_keys(rows)


def _exported(folder: Path, forms: tuple[Form, ...], console: Console) -> Results:
    """The scores of every task through its own export: `exported` (LoRA) and `merged`, of these the ones asked for."""
    named = " and ".join(f"one {EXPORTS[form][1]}" for form in forms)
    console.print(f"[bold]Exporting[/bold] every task: {named} each")
    tasks: dict[str, dict[str, TaskScore]] = {form: {} for form in forms}
    for fidelity in export(folder, Request(forms=forms), console):
        (task,) = fidelity.tasks
        tasks[fidelity.form][task] = TaskScore(fidelity.score, fidelity.samples)
    return {EXPORTS[form][0]: {"test": Scores("test", tasks[form])} for form in forms}


def _table(results: Results) -> Table:
    table = Table(title="Exact match per task")
    table.add_column("task")
    order = ("backbone", "tuned", *(column for column, _ in EXPORTS.values()), "blind")
    columns = [column for column in order if column in results]
    for column in columns:
        table.add_column(column, justify="right")
    for split, label in (("test", "mean"), ("held_out", "mean, never trained")):
        scores = [results[name].get(split) for name in columns]  # there is no export of a task that was never trained
        for task in results["tuned"][split].tasks:
            table.add_row(task, *(f"{own.tasks[task].score:.2f}" if own else "-" for own in scores))
        means = (f"[bold]{own.mean:.2f}" if own else "-" for own in scores)
        table.add_row(f"[bold]{label}", *means, end_section=True)
    return table
