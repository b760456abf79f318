"""The splits that a recipe names."""

from __future__ import annotations

from datasets import Dataset

from qmixlora.errors import UserError
from qmixlora.recipe import Data

from .loading import load_conversations

SPLITS = ("train", "validation", "test")


def load_split(data: Data, split: str) -> Dataset:
    """The conversations of one split of a recipe. Raises UserError if the recipe has no such split."""
    source = getattr(data, split, None) if split in SPLITS else None
    if source is None:
        have = [name for name in SPLITS if getattr(data, name)]
        raise UserError(f"The recipe has no split {split!r}.", where="data", fix=f"It has: {', '.join(have)}.")
    return load_source(data, source, split)


def load_source(data: Data, source: str, split: str) -> Dataset:
    """The conversations of any source, read as a recipe reads its own. Raises UserError as `load_conversations`."""
    return load_conversations(
        source,
        split=split,
        image_root=data.image_root,
        task_field=data.task_field,
        columns=data.columns,
        template=data.question_template(),
        on_bad_sample=data.on_bad_sample,
        max_pixels=data.max_pixels,
    )
