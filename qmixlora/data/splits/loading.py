"""The splits that a recipe names."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

from datasets import Dataset, concatenate_datasets

from qmixlora.data.reading.loading import Loaded, load
from qmixlora.data.reading.rows import Reading
from qmixlora.data.reading.store import FEATURES
from qmixlora.data.refusals import Refusals
from qmixlora.errors import UserError
from qmixlora.recipe import Data, Part

from .cutting import cut
from .identity import fingerprint

SPLITS = ("train", "validation", "test")
# of a part of a mixture, in place of those of all data
OWN = ("columns", "template", "image_root", "task_field", "subset")


def load_split(data: Data, split: str) -> Dataset:
    """The conversations of one split of a recipe. Raises UserError as `read_splits`, and as `Loaded.usable`."""
    return read_splits(data, [split]).loaded[split].usable(source_of(data, split), data.on_bad_sample)


def load_source(data: Data, source: str, split: str) -> Dataset:
    """The conversations of any source, read as a recipe reads its own. Raises UserError as `load_conversations`."""
    return _read(data, source, split).usable(source, data.on_bad_sample)


def splits_of(data: Data) -> list[str]:
    """The splits that a recipe has."""
    return [split for split in SPLITS if getattr(data, split)]


def held_out_split(data: Data) -> str:
    """The split that a run and its exports are measured on; `train` where nothing is held out."""
    return splits_of(data)[-1]


def source_of(data: Data, split: str) -> str:
    """What a split is called in messages: where it comes from."""
    source = getattr(data, split)
    if is_cut(data, split):
        return f"data.{split}, cut from {source_of(data, 'train')}"
    return source if isinstance(source, str) else ", ".join(data.sources)


def is_cut(data: Data, split: str) -> bool:
    """Whether a split is cut from the training data."""
    return split in _amounts(data)


@dataclass(frozen=True)
class Splits:
    """Some splits of a recipe; and all that are cut from its training data, if that was read."""

    loaded: Mapping[str, Loaded]
    cut: Mapping[str, Dataset]

    @cached_property
    def learned(self) -> str:
        """A digest of the split `train`, which tells whether it is the same another time."""
        return fingerprint(self.loaded["train"].rows)

    @cached_property
    def held_out(self) -> dict[str, str]:
        """A digest of each split that is cut, which tells whether it is the same another time."""
        return {split: fingerprint(rows) for split, rows in self.cut.items()}


def read_splits(data: Data, splits: Sequence[str]) -> Splits:
    """Some splits of a recipe, each source read once.

    Training rows that are not those that the recipe's run learned are told on stderr, once. What is refused in the
    training data is told of the split `train`, and where that is not asked for, of the first
    that is cut from it.

    Raises:
        UserError: the recipe has no such split; a source as `load`; as `cut`; or of a run, other rows than it held out
            would be cut now.
    """
    for split in splits:
        if split not in splits_of(data):
            have = ", ".join(splits_of(data))
            raise UserError(f"The recipe has no split {split!r}.", where="data", fix=f"It has: {have}.")
    amounts = _amounts(data)
    own = {split: _read(data, getattr(data, split), split) for split in splits if split not in {"train", *amounts}}
    cut_or_train, parts = [split for split in splits if split not in own], dict[str, Dataset]()
    if cut_or_train:
        sources = _training_sources(data)
        parts = _parted(data, sources)
        teller = "train" if "train" in cut_or_train else cut_or_train[0]
        for split in cut_or_train:
            refused, part = (sources.refused if split == teller else Refusals()), parts[split]
            own[split] = Loaded(part, refused, sources.read if refused.count else len(part))
    found = Splits({split: own[split] for split in splits}, {split: parts[split] for split in amounts if parts})
    _check_held_out(data, found)
    if data.learned and "train" in found.loaded and found.learned != data.learned:
        _tell_other_rows(source_of(data, "train"))
    return found


@lru_cache
def _tell_other_rows(source: str) -> None:
    print(
        f"data.train: {source} has changed since the run learned it: what is made of these rows, or measured on them, "
        "is of others than it learned. If that is not meant, bring the data back, and do it again.",
        file=sys.stderr,
    )


def _check_held_out(data: Data, found: Splits) -> None:
    """Raise UserError if what is cut is not what the run of the recipe held out: it may have been trained on."""
    amounts = _amounts(data)
    if data.held_out is None and found.cut:
        named = " and ".join(f"data.{split}" for split in amounts)
        print(
            f"{named}: the run is of a release that did not record what it held out. If the data has changed since, "
            "some of these rows are among those that it was trained on.",
            file=sys.stderr,
        )
    for split, digest in (data.held_out or {}).items():
        if split in found.cut and found.held_out[split] != digest:
            raise UserError(
                f"The rows that are cut for {split} are not those that the run held out: it was trained on some of "
                "them. The data, or how it is cut, has changed since.",
                where=f"data.{split}: {amounts[split]:g} of {source_of(data, 'train')}",
                fix="Bring the data back, or ask the run with a file of its own (`qmixlora eval RUN --data FILE`). For "
                "a new run remove data.held_out from the recipe.",
            )


@dataclass(frozen=True)
class _Source:
    """Rows to train on, each of them once; their numbers as often as they are trained on, and in that order; and what
    was left out of so many that were read.
    """

    rows: Dataset
    order: list[int]
    refused: Refusals
    read: int


def _training_sources(data: Data) -> _Source:
    """The rows of all sources, one source after the other."""
    if isinstance(data.train, str):
        loaded = _read(data, data.train, "train")
        return _Source(loaded.rows, [*range(len(loaded.rows))], loaded.refused, loaded.read)
    parts = [_source_of(part, data) for part in data.train]
    starts = accumulate((len(part.rows) for part in parts), initial=0)
    order = [start + index for start, part in zip(starts, parts, strict=False) for index in part.order]
    rows, refused = concatenate_datasets([part.rows for part in parts]), Refusals.of_all(part.refused for part in parts)
    return _Source(rows, order, refused, sum(part.read for part in parts))


def _source_of(part: Part, data: Data) -> _Source:
    """The rows of a part of a mixture, as often as it says. Raises UserError if that is never."""
    own = {name: value for name in OWN if (value := getattr(part, name)) is not None}
    loaded = _read(data.model_copy(update=own), part.path, part.split)
    rows = loaded.rows
    if part.task is not None:
        rows = rows.remove_columns(["task", "tasks"]).add_column("task", [part.task] * len(rows))
        rows = rows.add_column("tasks", [[]] * len(rows), feature=FEATURES["tasks"])
    count = part.samples or round((part.weight or 1) * len(rows))
    if not count:
        raise UserError(
            f"A weight of {part.weight:g} leaves none of its {len(rows)} rows.",
            where=f"data.train: {part.path}",
            fix="Raise the weight, say how many with samples, or remove the source.",
        )
    whole, rest = divmod(count, len(rows))
    drawn = sorted(random.Random(data.split_seed).sample(range(len(rows)), rest))
    order = [*range(len(rows))] * whole + drawn
    if not whole:
        rows, order = rows.select(drawn), [*range(rest)]
    return _Source(rows.select_columns(list(FEATURES)).cast(FEATURES), order, loaded.refused, loaded.read)


def _amounts(data: Data) -> dict[str, float]:
    """The splits that are cut from the training data, in the order in which they are."""
    amounts = {"test": data.test, "validation": data.validation}
    return {split: amount for split, amount in amounts.items() if isinstance(amount, float)}


def _parted(data: Data, sources: _Source) -> dict[str, Dataset]:
    """The training data and the splits that are cut from it: of these a row is there once, however often it would be
    trained on.
    """
    rows, parts = sources.rows, dict[str, Dataset]()
    left = [*range(len(rows))]
    for split, amount in _amounts(data).items():
        wanted = round(amount * len(sources.rows)) if amount < 1 else int(amount)
        where = f"data.{split}: {amount:g}"
        found = cut(rows, max(1, wanted), data.split_seed, where)
        parts[split], rows = rows.select(found.held_out), rows.select(found.rest)
        left = [left[index] for index in found.rest]
    at = {number: index for index, number in enumerate(left)}
    order = [at[number] for number in sources.order if number in at]
    return {**parts, "train": rows if order == [*range(len(rows))] else rows.select(order)}


def _read(data: Data, source: str, split: str) -> Loaded:
    reading = Reading(data.task_field, data.columns, data.question_template(), data.subset)
    return load(source, split, data.image_root, reading, data.max_pixels, data.allow_outside)
