"""qmixlora train"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.learning_rate=1e-3.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe, print it resolved, and stop.")] = False,
) -> None:
    """One run: the recipe's model, adapter and data, trained on this machine."""
    from qmixlora.recipe import load_recipe

    parsed = load_recipe(recipe, overrides or [])
    if dry_run:
        print(parsed.to_yaml(), end="")
        return
    from .quiet import quiet

    quiet()
    from qmixlora.demo import resolve
    from qmixlora.training import train_within_memory

    console = Console()
    folder = train_within_memory(resolve(parsed, None, console), resume=resume, console=console)
    console.print(f"Done: {folder}. Next: [bold]qmixlora eval {folder}[/bold]", highlight=False)
