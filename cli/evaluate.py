"""qmixlora eval"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qmixlora.errors import UserError

from . import here
from .ending import say_next, say_next_of
from .output import print_json

if TYPE_CHECKING:
    from qmixlora.evaluation import Scores

RIGHT = 0.5  # scores below it are shown as wrong answers


def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or of their exports.")],
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    split: Annotated[
        str | None, typer.Option(help="test, validation or train (default: the first of them that the recipe has).")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Another file, read as the recipe reads its own.")] = None,
    backbone: Annotated[bool, typer.Option("--backbone", help="The bare backbone, without the adapter.")] = False,
    wrong: Annotated[int, typer.Option(min=0, help="Show so many of the first wrong answers.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")] = False,
) -> None:
    """Scores by task and their mean, by real generation; kept in a file, with every answer, if nothing is left out."""
    _check(runs, split, data)
    from .quiet import quiet

    quiet()
    from qmixlora.evaluation import write_results
    from qmixlora.report.page import refresh_report

    console, results, failed = Console(stderr=as_json, highlight=False), {}, []
    for run in runs:
        scores = _scores(run, split, data, task, backbone, console)
        results[str(run)] = scores.to_dict()
        said = []
        if task is None:
            try:  # before anything is shown: a terminal that is gone loses no answers
                said.append(write_results(run, scores, backbone=backbone))
                said += [refresh_report(run)] if (run / "adapter").is_dir() else []  # an export has none of its own
            except UserError as error:  # the folder cannot be written into: what was measured is printed all the same
                failed.append(error)
        if not as_json:
            _show(scores, _title(scores, run, data, backbone), console)
        for prediction in [one for one in scores.predictions if one.score < RIGHT][:wrong]:
            console.print(_wrong(prediction), highlight=False, soft_wrap=True)
        for line in said:
            console.print(line, markup=False, soft_wrap=True)
    if not failed:
        _say_next(console, runs, task, data, backbone)
    if as_json:
        print_json(results if len(runs) > 1 else results[str(runs[0])])
    if failed:
        raise failed[0]


def _check(runs: list[Path], split: str | None, data: Path | None) -> None:
    """Raise UserError unless it is plain whom to ask what."""
    for run in runs:
        here.folder_of_model(run)
        if data is None and not (run / "recipe.yaml").is_file():
            fix = "Name a file with questions and answers: --data F."
            raise UserError(
                "There is nothing to ask it: this model has no recipe, and no data.", where=str(run), fix=fix
            )
    here.file(data, "--data")
    here.not_both({"--data": data, "--split": split})


def _show(scores: Scores, title: str, console: Console) -> None:
    console.print(title, style="bold", markup=False, soft_wrap=True)
    console.print(_table(scores))
    if scores.cut:
        of = f"{scores.cut} of {len(scores.predictions)} answers"
        console.print(f"Cut after train.max_new_tokens and scored as they are: {of}.", style="yellow")


def _say_next(console: Console, runs: list[Path], task: str | None, data: Path | None, backbone: bool) -> None:
    """Compare what was evaluated on the same rows, or go on with the run."""
    if task is not None:
        console.print("Nothing is kept of one task alone.", highlight=False)
    elif backbone and (runs[0] / "adapter").is_dir():
        say_next(console, "compare", runs[0], "--backbone", to="what training changed")
        return
    elif len(runs) > 1 and data is None:
        say_next(console, "compare", *runs, to="which differences are some")
        return
    say_next_of(console, runs[0])


def _title(scores: Scores, run: Path, data: Path | None, backbone: bool) -> str:
    """What was asked what."""
    seen = " (not held out: trained on)" if scores.split == "train" else ""
    rows = f"file {data}" if data else f"split {scores.split}{seen}"
    return f"{'backbone of ' if backbone else ''}{run}, {rows}"


def _scores(
    run: Path, split: str | None, data: Path | None, task: str | None, backbone: bool, console: Console
) -> Scores:
    from qmixlora.data import held_out_split, indices_of_tasks, load_source, load_split
    from qmixlora.evaluation import UnscoredError, keep_unscored, too_long_to_answer
    from qmixlora.evaluation import evaluate as score
    from qmixlora.export import exported_tasks
    from qmixlora.progress import progress
    from qmixlora.session import open_run

    session = open_run(run)
    if data is None:
        split = split or held_out_split(session.recipe.data)
        rows = load_split(session.recipe.data, split)
    else:
        try:
            rows, split = load_source(session.recipe.data, str(data), "train"), f"file-{data.stem}"
        except UserError as error:
            form = f"{data} is read as the run's own data, by the keys of `data` in {run / 'recipe.yaml'}."
            raise UserError(error.what, where=error.where, fix=f"{error.fix} {form}".lstrip()) from None
    numbers: list[int] | None = None
    if tasks := [task] if task is not None else exported_tasks(run):
        rows = rows.select(numbers := indices_of_tasks(rows, tasks, where=f"split {split}"))
    if warning := too_long_to_answer(session, rows):
        console.print(f"{run}: {warning}", style="yellow", markup=False, soft_wrap=True)
    model = session.without_adapter() if backbone else contextlib.nullcontext()
    try:
        with model, progress(f"answers of {run}", console) as tell:
            return score(session, rows, split, lambda done: tell(done, len(rows)), numbers).with_image_keys(rows)
    except UnscoredError as error:
        raise keep_unscored(run, error, backbone=backbone) from error


def _table(scores: Scores) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("task", "metric", "score", "95 %", "count", *(["cut"] if scores.cut else [])):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for name, own in scores.tasks.items():
        row = escape(name), escape(own.measure), f"{own.score:.3f}", _interval(own.interval), str(own.count)
        table.add_row(*row, *([str(own.cut)] if scores.cut else []))
    table.add_section()
    count = sum(own.count for own in scores.tasks.values())
    row = "mean over tasks", "", f"{scores.mean:.3f}", _interval(scores.interval), str(count)
    table.add_row(*row, *([str(scores.cut)] if scores.cut else []))
    return table


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _wrong(prediction: Any) -> str:
    said = f"[red]{escape(prediction.answer.strip()) or 'nothing'}[/red]" + " (cut)" * prediction.cut
    expected = escape(" | ".join(dict.fromkeys(prediction.references)))
    return (
        f"[bold]{escape(prediction.task)}[/bold] {prediction.row}: {escape(prediction.question)}\n"
        f"  said {said}, expected {expected}" + (f"\n  {escape(prediction.shown)}" if prediction.images else "")
    )
