"""qmixlora recipes"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Column, Table

from qmixlora.errors import UserError
from qmixlora.recipe import json_schema, load_recipe, read_recipe, shipped_recipes

from . import here
from .ending import say_next
from .output import print_json
from .overrides import Verb

app = typer.Typer(help="The shipped recipes.", no_args_is_help=True)


@app.command("list", cls=Verb)
def list_recipes(
    family: Annotated[str | None, typer.Option(help="Only names with this in them, such as qwen.")] = None,
    vram: Annotated[float | None, typer.Option(help="Only those for cards of at most so many GB.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A list of objects.")] = False,
) -> None:
    """Every shipped recipe, one in a line: samples at a time and their longest, planned peak (GiB), card."""
    rows = [_row(name, text) for name, text in shipped_recipes().items()]
    rows = [row for row in rows if family is None or family.lower() in row["name"]]
    rows = [row for row in rows if vram is None or (row["card_gb"] or row["peak_gib"] or 0) <= vram]
    if as_json:
        print_json(rows)
        return
    if not rows:
        raise UserError("No shipped recipe is like that.", where="recipes list", fix="Leave --family or --vram out.")
    table = Table(Column("name", overflow="fold"), "samples", "peak", "card", box=box.SIMPLE, pad_edge=False)
    for row in sorted(rows, key=lambda row: (row["card_gb"] or 0, row["name"])):
        peak = f"{row['peak_gib']:.1f}" if row["peak_gib"] else ""
        card = f"{row['card_gb']} GB" if row["card_gb"] else "none"
        table.add_row(row["name"], f"{row['micro_batch_size']} x {row['max_length']:,}", peak, card)
    console = Console()
    console.print(table)
    say_next(console, "recipes", "copy", "NAME", "my.yaml", to="recipes show NAME prints one")


@app.command(cls=Verb)
def show(name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")]) -> None:
    """The bare YAML of a recipe."""
    print(read_recipe(name)[0], end="")


@app.command(cls=Verb)
def copy(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    to: Annotated[Path | None, typer.Argument(help="File to write (default: NAME.yaml here).")] = None,
) -> None:
    """Copy a recipe here, to edit it. An existing file is never overwritten."""
    text, target = read_recipe(name)[0], to or Path(f"{name}.yaml")
    here.write_new(target, text)
    console = Console()
    console.print(f"Written: {target}.", markup=False, highlight=False, soft_wrap=True)
    say_next(console, "data", target, to="with your data.train in it")


@app.command(cls=Verb)
def check(
    names: Annotated[list[str] | None, typer.Argument(help="Recipes or files (default: all shipped).")] = None,
) -> None:
    """Validate recipes, and plan those that are named after a card; exits 1 if one is wrong or does not fit."""
    from .quiet import quiet

    quiet()
    from qmixlora.demo import resolve
    from qmixlora.device import GIB
    from qmixlora.memory import card_of, check_fit

    failed = False
    for name in names or shipped_recipes():
        try:
            recipe = load_recipe(name)
            if card_of(name) is None:
                print(f"ok      {name}")
                continue
            plan = check_fit(name, read_recipe(name)[0], resolve(recipe, None, Console(stderr=True)))
            print(f"ok      {name}  {plan.peak / GIB:.1f} GiB")
        except UserError as error:
            failed = True
            print(f"wrong   {name}\n{error}")
    if names and not failed:
        say_next(Console(), "train", names[0])
    raise SystemExit(int(failed))


@app.command(cls=Verb)
def schema() -> None:
    """JSON schema of a recipe, for editors."""
    print_json(json_schema())


def _row(name: str, text: str) -> dict[str, Any]:
    """What the list says of a recipe; None where its file does not."""
    recipe = load_recipe(name)
    peak, card = re.search(r"Predicted peak: ([\d.]+) GiB", text), re.search(r"-(\d+)gb$", name)
    return {
        "name": name,
        "purpose": text.splitlines()[0].lstrip("# ").strip() if text else "",
        "model": recipe.model.id,
        "micro_batch_size": recipe.train.micro_batch_size,
        "max_length": recipe.data.max_length,
        "peak_gib": float(peak[1]) if peak else None,
        "card_gb": int(card[1]) if card else None,
    }
