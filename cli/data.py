"""qmixlora data"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table


def data(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as data.train=rows.jsonl.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON, and nothing else.")] = False,
) -> None:
    """What a recipe's data holds, every row looked at; exits 1 if a run could not use some of it."""
    from qmixlora.recipe import load_recipe

    parsed = load_recipe(recipe, overrides or [])
    from .quiet import quiet

    quiet()
    from qmixlora.demo import resolve
    from qmixlora.inspection.dataset import describe

    facts = describe(resolve(parsed, None, Console(stderr=True)))
    if as_json:
        print(json.dumps(facts.to_dict(), indent=2))
    else:
        _show(facts.to_dict(), Console(highlight=False))
    raise SystemExit(int(facts.refused > 0))


def _show(facts: dict[str, Any], console: Console) -> None:
    table = Table(
        Column("split", no_wrap=True), "samples", "refused", "median", "p99", "most", "image", "images", "twice"
    )
    for split in facts["splits"]:
        tokens = split["tokens"] or {}
        sizes = [f"{tokens[name]:.0f}" if tokens else "-" for name in ("median", "p99", "largest", "largest_of_images")]
        images = ", ".join(f"{count} x {number}" for number, count in split["images"].items())
        table.add_row(
            split["split"], str(split["samples"]), str(split["refused"]), *sizes, images, str(split["duplicates"])
        )
    console.print(table)
    console.print("Sizes in tokens (image: the most of a sample's images); images: samples x images in each.")
    for split in facts["splits"]:
        tasks = ", ".join(f"{escape(task)} {count}" for task, count in split["tasks"].items())
        answers = ", ".join(f"{escape(repr(answer))} {count}" for answer, count in split["answers"].items())
        console.print(f"[bold]{split['split']}[/bold]: {tasks}")
        console.print(f"  answers: {answers}")
        if split["shown_in_training"]:
            console.print(f"  [yellow]{split['shown_in_training']} samples show images of the training data.[/yellow]")
        for where, what in split["refusals"]:
            console.print(f"  [red]{escape(where)}[/red]: {escape(what)}", soft_wrap=True)
        if split["refused"] > len(split["refusals"]):
            console.print(f"  and {split['refused'] - len(split['refusals'])} more")
    for note in facts["template"]:
        console.print(escape(note))
