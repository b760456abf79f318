"""qmixlora train"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


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
) -> None:
    """One run: the recipe's model, adapter and data, trained on this machine."""
    from qmixlora.errors import UserError
    from qmixlora.recipe import Edit, load_recipe, load_run_recipe

    if resume and init_from:
        raise UserError("--init-from begins a new run: it does not go with --resume.", where="command line")
    if resume and Path(recipe).is_dir():  # the folder of a run, which may have been moved
        parsed = Edit({"train.output": recipe}).apply(load_run_recipe(Path(recipe), overrides or []))
    else:
        parsed = load_recipe(recipe, overrides or [])
    if dry_run:
        print(parsed.to_yaml(), end="")
        return
    from .quiet import quiet

    quiet()
    from qmixlora.demo import resolve
    from qmixlora.training import train_within_memory

    console = Console()
    resolved = resolve(parsed, None, console)
    folder = train_within_memory(resolved, resume=resume, init_from=init_from, console=console)
    from qmixlora.report.page import refresh_report

    console.print(refresh_report(folder), highlight=False, soft_wrap=True)
    console.print(f"Done: {folder}. Next: [bold]qmixlora eval {folder}[/bold]", highlight=False)
