"""The embedded default: a tiny LLaVA made here, its data set on disk, and the demonstration that uses both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qmixlora.recipe import EMBEDDED, Recipe

if TYPE_CHECKING:
    from rich.console import Console


def resolve(recipe: Recipe, data_folder: Path | None, console: Console) -> Recipe:
    """Put real paths where a recipe says `embedded`, making backbone and data set on first use.

    The backbone is cached (`backbone_folder`); the data set goes to `data_folder`, or beside the cached backbone.
    A recipe that names its own model and data comes back as it is.
    """
    if EMBEDDED not in (recipe.model.id, recipe.data.train):
        return recipe
    from .backbone import backbone_folder
    from .run import make_backbone_with_progress

    model, data = recipe.model, recipe.data
    if model.id == EMBEDDED:
        model = model.model_copy(update={"id": str(make_backbone_with_progress(console))})
    if data.train == EMBEDDED:
        from .dataset import make_dataset

        folder = make_dataset(data_folder or backbone_folder().with_name("embedded-data-v3")).resolve()
        files = {split: str(folder / f"{split}.json") for split in ("train", "validation", "test")}
        data = data.model_copy(update=files)
    return recipe.model_copy(update={"model": model, "data": data})
