"""The recipe: everything a run depends on, typed and strict. No torch here, so that the command line stays fast."""

from .edit import Edit, edited, leaves
from .reading import json_schema, load_recipe, load_run_recipe, read_recipe, recipe_name, shipped_recipes
from .schema import (
    EMBEDDED,
    MADE_HERE,
    MAX_PIXELS,
    OWN_INPUT,
    REAL,
    Adapter,
    Checkpointing,
    Columns,
    Data,
    Export,
    Model,
    Part,
    Recipe,
    Train,
)
from .steps import steps_of
from .strict_yaml import Dumper, dump_yaml
from .validation import validate

__all__ = [
    "EMBEDDED",
    "MADE_HERE",
    "MAX_PIXELS",
    "OWN_INPUT",
    "REAL",
    "Adapter",
    "Checkpointing",
    "Columns",
    "Data",
    "Dumper",
    "Edit",
    "Export",
    "Model",
    "Part",
    "Recipe",
    "Train",
    "dump_yaml",
    "edited",
    "json_schema",
    "leaves",
    "load_recipe",
    "load_run_recipe",
    "read_recipe",
    "recipe_name",
    "shipped_recipes",
    "steps_of",
    "validate",
]
