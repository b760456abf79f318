"""qmixlora recipes"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from qmixlora.errors import UserError
from qmixlora.recipe import json_schema, load_recipe, read_recipe, shipped_recipes

app = typer.Typer(help="The shipped recipes.", no_args_is_help=True)


@app.command("list")
def list_recipes(
    as_json: Annotated[bool, typer.Option("--json", help="A list of objects with name and purpose.")] = False,
) -> None:
    """Every shipped recipe and its purpose."""
    rows = [{"name": name, "purpose": _purpose(text)} for name, text in shipped_recipes().items()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("name", "purpose")
    for row in rows:
        table.add_row(row["name"], row["purpose"])
    Console().print(table)


@app.command()
def show(name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")]) -> None:
    """The bare YAML of a recipe."""
    print(read_recipe(name)[0], end="")


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    to: Annotated[Path | None, typer.Argument(help="File to write (default: NAME.yaml here).")] = None,
) -> None:
    """Copy a recipe here, to edit it. An existing file is never overwritten."""
    text, target = read_recipe(name)[0], to or Path(f"{name}.yaml")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError("The file exists.", where=str(target), fix="Name another file.") from None
    except OSError as error:
        raise UserError(f"Cannot write the recipe: {error}", where=str(target)) from None
    print(target)


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(help="Recipes or files (default: all shipped).")] = None,
) -> None:
    """Validate recipes, and plan those that are named after a card; exits 1 if one is wrong or does not fit."""
    from .quiet import quiet

    quiet()
    from qmixlora.device import GIB
    from qmixlora.memory import card_of, check_fit

    failed = False
    for name in names or shipped_recipes():
        try:
            recipe, stem = load_recipe(name), Path(name).name.removesuffix(".yaml")
            if card_of(stem) is None:
                print(f"ok      {name}")
                continue
            plan = check_fit(stem, read_recipe(name)[0], recipe)
            print(f"ok      {name}  {plan.peak / GIB:.1f} GiB")
        except UserError as error:
            failed = True
            print(f"wrong   {name}\n{error}")
    raise SystemExit(int(failed))


@app.command()
def schema() -> None:
    """JSON schema of a recipe, for editors."""
    print(json.dumps(json_schema(), indent=2))


def _purpose(text: str) -> str:
    first = text.splitlines()[0] if text else ""
    return first.lstrip("# ").strip()
