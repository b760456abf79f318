"""The recipe: everything a run depends on, typed and strict. No torch here, so that the command line stays fast."""

from .reading import json_schema, load_recipe, read_recipe, shipped_recipes, validate
from .schema import EMBEDDED, Adapter, Checkpointing, Data, Export, Model, Recipe, Train

__all__ = [
    "EMBEDDED",
    "Adapter",
    "Checkpointing",
    "Data",
    "Export",
    "Model",
    "Recipe",
    "Train",
    "json_schema",
    "load_recipe",
    "read_recipe",
    "shipped_recipes",
    "validate",
]
