"""The embedded default: a tiny LLaVA made here, its data set on disk, and the demonstration that uses both.

`real/` has the same on a language model of 135 million parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qmixlora.recipe import MADE_HERE, Recipe

if TYPE_CHECKING:
    from rich.console import Console


def resolve(recipe: Recipe, data_folder: Path | None, console: Console) -> Recipe:
    """Put real paths where a recipe says `embedded` or `real`, making backbone and data set on first use.

    Backbones are cached (`cache_folder`); the data set goes to `data_folder`, or beside them. A recipe that names its
    own model and data comes back as it is.

    Raises:
        UserError: the language model of `real` is not installed; or the data's folder holds something else.
    """
    model, data = recipe.model, recipe.data
    if model.id not in MADE_HERE and data.train not in MADE_HERE:
        return recipe
    from .made_here import make_data, make_with_progress

    if model.id in MADE_HERE:
        model = model.model_copy(update={"id": str(make_with_progress(model.id, console))})
    if isinstance(data.train, str) and data.train in MADE_HERE:
        folder = make_data(data.train, data_folder)
        files = {split: str(folder / f"{split}.json") for split in ("train", "validation", "test")}
        data = data.model_copy(update=files)
    return recipe.model_copy(update={"model": model, "data": data})
