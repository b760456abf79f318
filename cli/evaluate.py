"""qmixlora eval"""

from __future__ import annotations

import contextlib
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from qmixlora.errors import UserError

if TYPE_CHECKING:
    from qmixlora.evaluation import Scores


def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or of one of its exports.")],
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    split: Annotated[str, typer.Option(help="test, validation or train.")] = "test",
    backbone: Annotated[bool, typer.Option("--backbone", help="The bare backbone, without the adapter.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")] = False,
) -> None:
    """Exact match per task and the mean, by real generation; those of a whole split are kept in a file."""
    from .quiet import quiet

    quiet()
    from qmixlora.data import load_split, only_tasks
    from qmixlora.evaluation import evaluate as score
    from qmixlora.evaluation import write_results
    from qmixlora.export import exported_tasks
    from qmixlora.session import TunedSession, open_run

    console = Console(stderr=as_json)
    session = open_run(run)
    rows = load_split(session.recipe.data, split)
    if tasks := [task] if task is not None else exported_tasks(run):
        rows = only_tasks(rows, tasks, where=f"split {split}")
    bare: AbstractContextManager[None] = contextlib.nullcontext()
    if backbone:
        if not isinstance(session, TunedSession):
            raise UserError("A merged checkpoint has no adapter to leave out.", where=f"{run}, --backbone")
        bare = session.model.disable_adapter()
    with bare, Progress(console=console, transient=True) as bar:
        shown = bar.add_task("evaluating", total=len(rows))
        scores = score(session, rows, split, on_progress=lambda done: bar.update(shown, completed=done))
    if as_json:
        print(json.dumps(scores.to_dict(), indent=2))
    else:
        console.print(_table(scores, f"Exact match, {'backbone of ' if backbone else ''}{run}, split {split}"))
    if task is None:  # after they are printed: the folder may be one that cannot be written
        console.print(write_results(run, scores, backbone=backbone), highlight=False, soft_wrap=True)


def _table(scores: Scores, title: str) -> Table:
    table = Table(title=title)
    for column in ("task", "exact match", "count"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name, own in scores.tasks.items():
        table.add_row(name, f"{own.score:.3f}", str(own.count))
    table.add_section()
    count = sum(own.count for own in scores.tasks.values())
    table.add_row("mean over tasks", f"{scores.mean:.3f}", str(count))
    return table
