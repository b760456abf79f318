"""qmixlora train"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from . import here
from .ending import say_next_of

if TYPE_CHECKING:
    from qmixlora.recipe import Recipe


def train(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, the name of a shipped recipe, or with --resume the folder of a run.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.learning_rate=1e-3.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    init_from: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Begin a new run with the adapter that another one learned.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe, print it resolved, and stop.")] = False,
    processes: Annotated[
        int, typer.Option(min=1, metavar="N", help="Processes of this machine that share a step, each on a GPU.")
    ] = 1,
) -> None:
    """One run: the recipe's model, adapter and data, trained on this machine (or with `accelerate launch` on many)."""
    from contextlib import nullcontext

    from qmixlora.launch import is_launched, launch

    if processes > 1 and not is_launched() and not dry_run:
        _parsed(recipe, overrides or [], resume, init_from)  # what is wrong with it is said once
        raise typer.Exit(launch(processes, [sys.executable, "-m", "qmixlora.cli.main", *sys.argv[1:]]))
    if is_launched():
        from .quiet import quiet

        quiet()
        from qmixlora.processes import joined
    with joined() if is_launched() else nullcontext():
        _train(_parsed(recipe, overrides or [], resume, init_from), resume, init_from, dry_run)


def _parsed(recipe: str, overrides: list[str], resume: bool, init_from: Path | None) -> Recipe:
    from qmixlora.recipe import Edit, load_recipe, load_run_recipe

    here.not_both({"--resume": resume, "--init-from": init_from})
    if resume and Path(recipe).is_dir():  # the folder of a run, which may have been moved
        here.folder_of_run(Path(recipe))
        return Edit({"train.output": recipe}).apply(load_run_recipe(Path(recipe), overrides))
    return load_recipe(recipe, overrides)


def _train(parsed: Recipe, resume: bool, init_from: Path | None, dry_run: bool) -> None:
    if dry_run:
        print(parsed.to_yaml(), end="")
        return
    from .quiet import quiet

    quiet()
    from qmixlora.demo import resolve
    from qmixlora.processes import main_first
    from qmixlora.training import train_within_memory

    console = Console()
    resolved = main_first(lambda: resolve(parsed, None, console))
    folder = train_within_memory(resolved, resume=resume, init_from=init_from, console=console)
    from qmixlora.report.page import refresh_report

    console.print(refresh_report(folder), markup=False, highlight=False, soft_wrap=True)
    console.print(f"Done: {folder}.", markup=False, highlight=False, soft_wrap=True)
    say_next_of(console, folder)
