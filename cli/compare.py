"""qmixlora compare"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    from qmixlora.evaluation.comparison import Comparison, Difference


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs or exports, or of results that `eval` wrote.")],
    split: Annotated[
        str | None, typer.Option(help="The split that they were evaluated on (default: as eval), or file-F for F.json.")
    ] = None,
    backbone: Annotated[
        bool, typer.Option("--backbone", help="And the first one's backbone, by what `eval --backbone` kept.")
    ] = False,
    blind: Annotated[
        bool, typer.Option("--blind", help="And a blind guess: to each question its most frequent training answer.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON, and nothing else.")] = False,
) -> None:
    """Runs side by side, by what `eval` kept of them: scores by task, and which differences from the first are some."""
    if len(runs) < 2 and not backbone and not blind:
        fix = "Name two runs or more, or add --backbone or --blind."
        raise UserError("There is nothing to compare with.", where="command line", fix=fix)
    repeated = [str(run) for run, count in Counter(runs).items() if count > 1]
    if repeated:
        raise UserError(f"{repeated[0]} is named twice.", where="command line")
    for run in runs:
        here.folder(run)
    from .quiet import quiet

    quiet()
    from qmixlora.evaluation.comparison import compare as compared
    from qmixlora.evaluation.results import blind_guess, read_results

    split = split or here.held_out(runs[0])
    scores = {str(run): read_results(run, split) for run in runs}
    if backbone:
        scores[f"backbone of {runs[0]}"] = read_results(runs[0], split, backbone=True)
    if blind:
        here.folder_with_recipe(runs[0])
        scores["blind guess"] = blind_guess(runs[0], split)
    comparison = compared(scores)
    if as_json:
        print_json(comparison.to_dict())
        return
    _show(comparison, split, runs)


def _show(comparison: Comparison, split: str, runs: list[Path]) -> None:
    console = Console(highlight=False)
    console.print(_table(comparison, split))
    console.print(
        "In brackets: the difference from the first; below: its 95 % interval over the samples; [bold]bold[/bold] "
        "where the paired permutation test has p < 0.05, for which six samples at least have to differ. Neither knows "
        "anything of other training seeds."
    )
    if comparison.left_out:
        console.print(f"Not all were asked: {', '.join(comparison.left_out)}.", markup=False, soft_wrap=True)
    if all((run / "adapter").is_dir() for run in runs):
        say_next(console, "report", *runs, to="the page: scores, curves, answers" + " side by side" * (len(runs) > 1))
    else:
        say_next_of(console, runs[0])


def _table(comparison: Comparison, split: str) -> Table:
    table = Table(title=escape(f"split {split}"), box=box.SIMPLE, pad_edge=False)
    table.add_column("task")
    for name in comparison.scores:
        table.add_column(escape(name), justify="right", overflow="fold")
    (_, reference), *others = comparison.scores.items()
    for task, own in reference.tasks.items():
        cells = [_cell(other.tasks[task].score, comparison.tasks[name][task]) for name, other in others]
        table.add_row(escape(f"{task}\n{own.measure}, {own.count}"), f"{own.score:.3f}", *cells)
    table.add_section()
    means = [_cell(other.mean, comparison.means[name]) for name, other in others]
    table.add_row("mean over tasks", f"{reference.mean:.3f}", *means)
    return table


def _cell(score: float, difference: Difference) -> str:
    """A score, how far it is from the first, and below that the interval of the difference."""
    low, high = difference.interval
    told = f"{score:.3f} ({difference.points:+.3f})\n{low:+.3f} to {high:+.3f}"
    return f"[bold]{told}[/bold]" if difference.is_one else told
