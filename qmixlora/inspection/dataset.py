"""What a recipe's data holds, and what of it a run could not use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from datasets import Dataset

from qmixlora.backbone import load_processor
from qmixlora.data import Collator, load_split, one_answer_each, rendering_of
from qmixlora.data.checking.survey import survey
from qmixlora.data.checking.taught import looked_at
from qmixlora.data.splits.cutting import image_keys
from qmixlora.data.splits.loading import SPLITS
from qmixlora.recipe import Recipe
from qmixlora.session import make_collator

COMMON = 5  # answers that are told


@dataclass(frozen=True)
class SplitFacts:
    """One split: its samples by task; lengths in tokens as a run makes them (None where nothing fits); how many images
    samples have; the most frequent answers; samples that occur again; images that the training data shows too; and what
    was refused.
    """

    split: str
    samples: int
    tasks: dict[str, int]
    tokens: dict[str, float] | None
    images: dict[int, int]
    answers: dict[str, int]
    duplicates: int
    shown_in_training: int
    refused: int
    refusals: list[list[str]] = field(default_factory=list)  # (where, what) of the first

    def to_dict(self) -> dict[str, Any]:
        """The split in the JSON of `qmixlora data`."""
        return asdict(self)


@dataclass(frozen=True)
class DataFacts:
    """All splits of a recipe, and what there is to know of the model's chat template."""

    splits: list[SplitFacts]
    template: list[str]

    @property
    def refused(self) -> int:
        """Samples that a run could not use."""
        return sum(split.refused for split in self.splits)

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `qmixlora data`."""
        return {"splits": [split.to_dict() for split in self.splits], "template": self.template}


def describe(recipe: Recipe) -> DataFacts:
    """Look at every row of every split, as a run does before its first step.

    Raises:
        UserError: a source cannot be read, or no processor can be loaded.
    """
    processor = load_processor(recipe.model, recipe.data.max_image_tokens)
    collator = make_collator(recipe, processor)
    loaded = {split: load_split(recipe.data, split) for split in SPLITS if getattr(recipe.data, split)}
    trained = {key for keys in image_keys(loaded["train"]) for key in keys}
    splits = [_facts(recipe, collator, split, rows, trained) for split, rows in loaded.items()]
    return DataFacts(splits, rendering_of(collator.template).notes())


def _facts(recipe: Recipe, collator: Collator, split: str, rows: Dataset, trained: set[str]) -> SplitFacts:
    rows = one_answer_each(rows, collator.template)
    kept, refusals = looked_at(rows, collator, recipe.data, f"data.{split}")
    tokens = None
    if kept:
        found = survey(rows.select(kept), collator)
        tokens = {
            "median": found.median, "p99": found.p99, "largest": found.most_tokens,
            "largest_of_images": found.most_image_tokens,
        }  # fmt: skip
    answers = Counter(row["turns"][-1]["text"] for row in rows)
    keys = list(image_keys(rows))
    return SplitFacts(
        split=split,
        samples=len(rows),
        tasks=dict(sorted(Counter(rows["task"]).items())),
        tokens=tokens,
        images=dict(sorted(Counter(len(own) for own in keys).items())),
        answers=dict(answers.most_common(COMMON)),
        duplicates=len(rows) - len(set(_identities(rows, keys))),
        shown_in_training=0 if split == "train" else sum(any(key in trained for key in own) for own in keys),
        refused=refusals.count,
        refusals=refusals.first,
    )


def _identities(rows: Dataset, keys: list[list[str]]) -> Iterator[Any]:
    """What makes two samples the same: what is said, and which images are shown."""
    for row, own in zip(rows, keys, strict=True):
        yield tuple((turn["role"], turn["text"]) for turn in row["turns"]), tuple(own)
