"""What a recipe's data holds, and what of it a run could not use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qmixlora.data import Checked, DataFacts, checked, rendering_of, splits_of
from qmixlora.recipe import Recipe
from qmixlora.session import open_collator


@dataclass(frozen=True)
class Described:
    """All splits of a recipe, what they hold, and what there is to know of the model's chat template."""

    data: Checked
    facts: DataFacts
    template: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `qmixlora data`."""
        return {**self.facts.to_dict(), "template": self.template}


def describe(recipe: Recipe) -> Described:
    """Look at every row of every split, as a run does before its first step.

    Raises:
        UserError: a source cannot be read, or no processor can be loaded.
    """
    collator = open_collator(recipe)
    found = checked(recipe.data, collator, splits_of(recipe.data))
    return Described(found, found.facts(recipe.train), rendering_of(collator.template).notes())
