"""The recipe: everything a run depends on, typed and strict. No torch here, so that the command line stays fast."""

from .reading import edited, json_schema, load_recipe, read_recipe, shipped_recipes, validate
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
    "edited",
    "json_schema",
    "load_recipe",
    "read_recipe",
    "shipped_recipes",
    "validate",
]
