"""qmixlora inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qmixlora.errors import UserError

from . import here
from .ending import say_next, say_next_of
from .output import print_json

FIGURES = "figures"  # in the run's folder
SAMPLES, BATCHES = 3, 4
SHOWN = 12  # tasks: more of them do not fit a terminal as a matrix
STYLES = {"supervised": "bold green", "routing": "blue", "other": "dim"}
KINDS = {"supervised": "what is learned", "routing": "what is routed on", "other": "the rest"}
MARKS = {"supervised": "[[{}]]", "routing": "<<{}>>", "other": "{}"}  # where there is no colour


def inspect(
    subject: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="A recipe, or the folder of a run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As for train.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="How many samples to show (default: 3).")] = None,
    split: Annotated[str | None, typer.Option(help="train, validation or test.")] = None,
    routing: Annotated[bool, typer.Option("--routing", help="How a run routes its tasks, with figures.")] = False,
    interference: Annotated[
        bool, typer.Option("--interference", help="How much the tasks of a run disturb each other, with a figure.")
    ] = False,
    batches: Annotated[
        int | None, typer.Option(min=1, help="Batches per task for --interference (default: 4).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")] = False,
) -> None:
    """Decoded samples as the model gets them: supervised tokens green, routing tokens blue, image tokens counted.

    Of a run also: the factors that its tasks use (--routing), and whose gradients oppose each other (--interference).
    """
    here.only_with("--interference", interference, {"--batches": batches})
    if routing or interference:
        here.folder_of_run(Path(subject))
        here.only_with("--interference", interference, {"--split": split})
        _refuse_of_samples(samples, overrides or [])
    from .quiet import quiet

    quiet()
    console = Console(stderr=as_json)
    if as_json and routing and interference:
        raise UserError("--json prints one result.", where="inspect", fix="Choose --routing or --interference.")
    if routing:
        _routing(Path(subject), console, as_json)
    if interference:
        _interference(Path(subject), split, batches or BATCHES, console, as_json)
    if interference:
        say_next_of(console, Path(subject))
    elif routing:
        say_next(console, "inspect", subject, "--interference", to="whose steps work against whose")
    else:
        _samples(subject, overrides or [], split or "train", samples or SAMPLES, console, as_json)


def _refuse_of_samples(samples: int | None, overrides: list[str]) -> None:
    """Raise UserError for what is of the samples alone, which are not shown beside --routing and --interference."""
    given = next(iter([*(["--samples"] if samples else []), *overrides]), None)
    if given:
        raise UserError(
            f"{given} is of the samples, which are not shown with --routing and --interference.",
            where=given,
            fix="Leave it out, or look at the samples by a command of their own.",
        )


def _samples(subject: str, overrides: list[str], split: str, count: int, console: Console, as_json: bool) -> None:
    from qmixlora.demo import resolve
    from qmixlora.inspection import decode_samples
    from qmixlora.recipe import load_recipe, load_run_recipe

    is_run = (Path(subject) / "recipe.yaml").is_file()
    recipe = load_run_recipe(Path(subject), overrides) if is_run else load_recipe(subject, overrides)
    resolved = resolve(recipe, None, console)
    shown = list(decode_samples(resolved, split, count))
    if as_json:
        print_json([sample._asdict() for sample in shown])
    for note in shown[0].notes if shown else []:
        console.print(note, markup=False, highlight=False)
    plain = console.color_system is None

    def marked(kind: str, piece: str) -> Text:
        return Text(MARKS[kind].format(piece) if plain else piece, STYLES[kind])

    console.print(Text(", ").join(marked(kind, name) for kind, name in KINDS.items()))
    for sample in shown:
        task = sample.task if isinstance(sample.task, str) else ", ".join(sample.task)
        told = f"[bold]{escape(task)}[/bold]  {sample.length} tokens, {sample.supervised} supervised"
        console.print(told, highlight=False)
        console.print(Text(" ").join(marked(kind, piece.strip()) for kind, piece in sample.pieces))
    if is_run and not (Path(subject) / "routing.safetensors").is_file():
        say_next_of(console, Path(subject))
    elif is_run:
        say_next(console, "inspect", subject, "--routing", to="the factors that its tasks use")
    else:
        say_next(console, "plan", subject, *overrides, to="whether it fits")


def _routing(run: Path, console: Console, as_json: bool) -> None:
    from qmixlora.report.figures import draw_routing
    from qmixlora.report.readings import read_routing_figures
    from qmixlora.report.routing import read_routing

    summary = read_routing(run)
    shown = summary.to_dict()
    if as_json:
        print_json(shown)
    figures = draw_routing(summary, run / FIGURES)
    console.print(
        f"Routing of {run}: {shown['layers']} layers, {shown['factors']} factors in a pool",
        markup=False,
        soft_wrap=True,
    )
    table = Table()
    for column in ("task", "entropy of usage", "most like", "similarity"):
        table.add_column(column, justify="left" if column in {"task", "most like"} else "right")
    for task, values in shown["tasks"].items():
        others = {other: value for other, value in values["similarity"].items() if other != task}
        nearest = max(others, key=lambda other: others[other], default="-")
        table.add_row(escape(task), f"{values['entropy']:.2f}", escape(nearest), f"{others.get(nearest, 0):.2f}")
    console.print(table)
    dead = shown["dead_factors"]
    console.print(
        f"Dead factors (under a tenth of an even share for every task): A {dead['A']}, B {dead['B']} of {dead['of']}"
    )
    moved = ", ".join(f"{one['step']}: {one['moved']:.3f}" for one in shown["drift"])
    console.print(f"Share of usage that moved since the snapshot before, by step: {moved}")
    for reading in read_routing_figures(summary):
        console.print(reading.styled(), highlight=False)
    console.print("Figures: " + ", ".join(str(path) for path in figures), markup=False, soft_wrap=True)


def _interference(run: Path, split: str | None, batches: int, console: Console, as_json: bool) -> None:
    from qmixlora.data import load_split
    from qmixlora.files import check_can_be_written, write_json
    from qmixlora.inspection.interference import POOLS, measure_interference
    from qmixlora.progress import progress
    from qmixlora.report.figures import draw_interference
    from qmixlora.report.readings import read_interference
    from qmixlora.session import open_run

    check_can_be_written(run / FIGURES)
    session = open_run(run)
    default = "validation" if session.recipe.data.validation else "train"
    rows = load_split(session.recipe.data, split or default)
    name = "interference" if split in (None, default) else f"interference-{split}"
    with progress("gradients", console) as tell:
        measured = measure_interference(session, rows, batches=batches, on_progress=tell)
    write_json(run / f"{name}.json", measured.to_dict())
    means = {pool: measured.mean(pool) for pool in POOLS}
    titled = {f"Factors {pool}": mean_TT for pool, mean_TT in means.items()}
    if as_json:
        print_json(measured.to_dict())
    figure = draw_interference(measured.tasks, titled, run / FIGURES / f"{name}.png")
    if len(measured.tasks) <= SHOWN:
        for pool, mean_TT in means.items():
            console.print(_interference_table(pool, measured.tasks, mean_TT.tolist()))
    console.print(read_interference(measured.tasks, measured.to_dict()["mean"]).styled(), highlight=False)
    for pool, cause, harmed, value in measured.conflicts(5):
        told = f"Conflict in {pool}: a step for {cause} changes {harmed} by {value:.2f} of its own step"
        console.print(told, markup=False)
    console.print(f"Figure: {figure}; per layer: {run / name}.json", markup=False, soft_wrap=True)


def _interference_table(pool: str, tasks: list[str], rows: list[list[float]]) -> Table:
    title = f"Factors {pool}: what the column's task's step does for the row's (its own: 1)"
    table = Table(title=title, box=box.SIMPLE, padding=0, show_edge=False)
    table.add_column("task", no_wrap=True)
    for number in range(len(tasks)):
        table.add_column(str(number + 1), justify="right")
    for number, (task, row) in enumerate(zip(tasks, rows, strict=True), 1):
        cells = (f"[red]{value:.2f}[/red]" if value < 0 else f"{value:.2f}" for value in row)
        table.add_row(escape(f"{number} {task}"), *cells)
    return table
