"""Samples as a run learns from them: decoded, with their supervised tokens and their routing tokens marked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from qmixlora.backbone import reader_record, tell_other_base
from qmixlora.data import IGNORED, load_split, one_answer_each, rendering_of
from qmixlora.recipe import Recipe
from qmixlora.session import open_collator


class DecodedSample(NamedTuple):
    """`pieces` are (kind, text) with kind `routing` (prompt), `supervised` or `other`; lengths are in tokens. Every
    answer ends in `end_token`; `notes` are what there is to know of the chat template (`Rendering.notes`). The task is
    written as data writes it: where answers are of several, a list of one for each.
    """

    task: str | list[str]
    length: int
    supervised: int
    pieces: list[tuple[str, str]]
    end_token: str
    notes: list[str]


def decode_samples(recipe: Recipe, split: str, count: int) -> Iterator[DecodedSample]:
    """The first samples of a split as the collator makes them. Raises UserError as loading the data does."""
    collator = open_collator(recipe)
    if recipe.model.learned_on:
        tell_other_base(recipe.model, reader_record(recipe.model), Path(recipe.train.output))
    processor = collator.processor
    rows, rendering = (
        one_answer_each(load_split(recipe.data, split), collator.template),
        rendering_of(collator.template),
    )
    for index in range(min(count, len(rows))):
        batch = collator([rows[index]])
        ids, labels, routing = (batch[name][0].tolist() for name in ("input_ids", "labels", "routing_mask"))
        kinds = [
            "supervised" if label != IGNORED else "routing" if routed else "other"
            for label, routed in zip(labels, routing, strict=True)
        ]
        image_token = getattr(processor, "image_token_id", None)
        pieces = []
        for kind, group in groupby(zip(kinds, ids, strict=True), key=lambda pair: (pair[0], pair[1] == image_token)):
            tokens = [token for _, token in group]
            text = f"[{len(tokens)} image tokens]" if kind[1] else processor.tokenizer.decode(tokens)
            pieces.append((kind[0], text + " "))
        supervised = sum(label != IGNORED for label in labels)
        yield DecodedSample(batch["tasks"][0], len(ids), supervised, pieces, rendering.end_token, rendering.notes())
