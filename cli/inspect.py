"""qmixlora inspect"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text


def inspect(
    recipe: Annotated[str, typer.Argument(help="A recipe: what would be trained on.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As for train.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples to show.")] = 3,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
) -> None:
    """Decoded samples as the model gets them: supervised tokens green, routing tokens blue, image tokens counted."""
    from .quiet import quiet

    quiet()
    from qmixlora.demo import resolve
    from qmixlora.inspection import decode_samples
    from qmixlora.recipe import load_recipe

    console = Console()
    resolved = resolve(load_recipe(recipe, overrides or []), None, console)
    styles = {"supervised": "bold green", "routing": "blue", "other": "dim"}
    for sample in decode_samples(resolved, split, samples):
        text = Text.assemble(*((piece, styles[kind]) for kind, piece in sample.pieces))
        console.print(f"[bold]{sample.task}[/bold]  {sample.length} tokens, {sample.supervised} supervised")
        console.print(text)
