"""A YAML file, or a shipped recipe, to a recipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from qmixlora.errors import UserError, did_you_mean, path_meant, some

from .edit import Edit
from .migration import migrate
from .schema import Recipe
from .strict_yaml import load_yaml
from .validation import validate

SUFFIXES = (".yaml", ".yml")  # of recipe files


def json_schema() -> dict[str, Any]:
    """JSON schema of the recipe, for editors (`# yaml-language-server: $schema=...`)."""
    return Recipe.model_json_schema()


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file or a shipped recipe, put in overrides (`train.learning_rate=1e-3`), and validate.

    Raises:
        UserError: no such recipe, broken YAML, or anything wrong in it; every mistake is listed with its path.
    """
    values, where = _values(name_or_path)
    for note in migrate(values):
        print(f"{where}: {note}", file=sys.stderr)
    return validate(Edit.parse(overrides).put_into(values), where)


def load_run_recipe(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run's folder, or of an export's: `load_recipe`, with what earlier releases did where it says
    nothing: a run's recipe has every key of the release that wrote it. Raises UserError as that.
    """
    values, where = _values(str(run / "recipe.yaml"))
    migrate(values)
    if isinstance(values.get("data"), dict):
        values["data"].setdefault("allow_outside", True)
        values["data"].setdefault("held_out", None)
    return validate(Edit.parse(overrides).put_into(values), where)


def _values(name_or_path: str) -> tuple[dict[str, Any], str]:
    """The bare values of a recipe, and where they are from."""
    text, where = read_recipe(name_or_path)
    try:
        values = load_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"This is not YAML: {getattr(error, 'problem', error)}", where=where + line) from None
    if not isinstance(values, dict):
        *sections, last = Recipe.model_fields
        raise UserError(f"A recipe is a mapping with the sections {', '.join(sections)} and {last}.", where=where)
    return values, where


def read_recipe(name_or_path: str) -> tuple[str, str]:
    """(text, where it came from) of a recipe file, or of a shipped recipe by its name."""
    path = Path(name_or_path)
    if path.suffix in SUFFIXES and not path.exists():
        fix = path_meant(path) or "Check the path."
        raise UserError("There is no such recipe file.", where=str(path), fix=fix)
    try:
        if path.suffix in SUFFIXES or path.is_file():
            return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the recipe: {error}", where=str(path), fix="Check the path.") from None
    shipped = shipped_recipes()
    if (path / "recipe.yaml").is_file():
        raise UserError(
            "This is the folder of a run, not a recipe.",
            where=str(path),
            fix=f"Go on with the run by --resume, or name {path / 'recipe.yaml'} with another train.output.",
        )
    if name_or_path not in shipped and path.is_dir():
        forms = (*(f"*{suffix}" for suffix in SUFFIXES), "*/recipe.yaml")
        inside = [file for form in forms for file in sorted(path.glob(form))]
        fix = f"Did you mean {inside[0]}?" if inside else "Name the path of a .yaml file, or a shipped recipe."
        raise UserError("This is a folder, not a recipe.", where=str(path), fix=fix)
    if name_or_path not in shipped and len(path.parts) > 1:  # a path: no shipped recipe has such a name
        fix = path_meant(path) or "Name a .yaml file or a shipped recipe, or with --resume the folder of a run."
        raise UserError("There is no such file or folder.", where=name_or_path, fix=fix)
    if name_or_path not in shipped:
        raise UserError(
            f"There is no recipe {name_or_path!r}.{did_you_mean(name_or_path, shipped)}",
            where="shipped recipes: " + some(list(shipped), 3),
            fix="`qmixlora recipes list` names all of them. Name one, or the path of a .yaml file.",
        )
    return shipped[name_or_path], f"shipped recipe {name_or_path}"


def recipe_name(name_or_path: str) -> str:
    """The name of a shipped recipe, or of a recipe's file without its folder and suffix."""
    path = Path(name_or_path)
    return path.stem if path.suffix in SUFFIXES else path.name


def shipped_recipes() -> dict[str, str]:
    """Name and bare YAML of every shipped recipe, sorted by name."""
    files = resources.files("qmixlora.recipes").iterdir()
    return {
        file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8")
        for file in sorted(files, key=lambda file: file.name)
        if file.name.endswith(".yaml")
    }
