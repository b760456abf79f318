"""The splits that a recipe names."""

from __future__ import annotations

import random

from datasets import Dataset, concatenate_datasets

from qmixlora.data.reading.loading import load_conversations
from qmixlora.data.reading.store import FEATURES
from qmixlora.errors import UserError
from qmixlora.recipe import Data, Part

from .cutting import cut

SPLITS = ("train", "validation", "test")
OWN = ("columns", "template", "image_root", "task_field")  # of a part of a mixture, in place of those of all data


def load_split(data: Data, split: str) -> Dataset:
    """The conversations of one split of a recipe. Raises UserError if the recipe has no such split, or as `cut`."""
    source = getattr(data, split, None) if split in SPLITS else None
    if source is None:
        have = [name for name in SPLITS if getattr(data, name)]
        raise UserError(f"The recipe has no split {split!r}.", where="data", fix=f"It has: {', '.join(have)}.")
    if isinstance(source, float) or (split == "train" and _amounts(data)):
        return _parted(data)[split]
    return _training_rows(data) if split == "train" else load_source(data, source, split)


def _training_rows(data: Data) -> Dataset:
    """The rows of all sources, one source after the other."""
    if isinstance(data.train, str):
        return load_source(data, data.train, "train")
    return concatenate_datasets([_rows_of(part, data) for part in data.train])


def _rows_of(part: Part, data: Data) -> Dataset:
    """The rows of a part of a mixture, as often as it says."""
    own = {name: value for name in OWN if (value := getattr(part, name)) is not None}
    rows = load_source(data.model_copy(update=own), part.path, part.split)
    if part.task is not None:
        rows = rows.remove_columns(["task", "tasks"]).add_column("task", [part.task] * len(rows))
        rows = rows.add_column("tasks", [[]] * len(rows), feature=FEATURES["tasks"])
    count = part.samples or round((part.weight or 1) * len(rows))
    whole, rest = divmod(count, len(rows))
    drawn = sorted(random.Random(data.split_seed).sample(range(len(rows)), rest))
    chosen = [*range(len(rows))] * whole + drawn
    rows = rows if chosen == [*range(len(rows))] else rows.select(chosen)
    return rows.select_columns(list(FEATURES)).cast(FEATURES)


def _amounts(data: Data) -> dict[str, float]:
    """The splits that are cut from the training data, in the order in which they are."""
    amounts = {"test": data.test, "validation": data.validation}
    return {split: amount for split, amount in amounts.items() if isinstance(amount, float)}


def _parted(data: Data) -> dict[str, Dataset]:
    """The training data and the splits that are cut from it."""
    rows = _training_rows(data)
    count, parts = len(rows), dict[str, Dataset]()
    for split, amount in _amounts(data).items():
        wanted = round(amount * count) if amount < 1 else int(amount)
        where = f"data.{split}: {amount:g}"
        found = cut(rows, max(1, wanted), data.split_seed, where)
        parts[split], rows = rows.select(found.held_out), rows.select(found.rest)
    return {**parts, "train": rows}


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
        allow_outside=data.allow_outside,
    )
