"""The micro-batches that are planned: the worst of the data at hand, as the run's own collator makes them.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from statistics import quantiles
from typing import Any

from PIL import Image
from transformers import AutoProcessor, PretrainedConfig, ProcessorMixin

from qmixlora.backbone.image_tokens.limits import limit_pictures
from qmixlora.memory.architectures import config_of
from qmixlora.memory.simulation.batch import Batch, synthetic_batch
from qmixlora.recipe import Data, Model, Recipe
from qmixlora.training.run import load_data

from . import Collator
from .formats import IMAGE

LOOKED_AT = 1000  # samples whose length is worked out for the median and the 99th percentile
CANDIDATES = 256  # samples that are told to be the longest by their characters and picture sizes
CHARACTERS = 4  # in a token, for that


def at_hand(recipe: Recipe) -> bool:
    """Whether the training data is a file on this machine."""
    return Path(recipe.data.train).is_file()


def batches_of(recipe: Recipe, config: PretrainedConfig, tokens: int | None) -> list[Batch]:
    """What to plan with: the data at hand, unless `tokens` says how long samples are; else what it could hold.

    Raises UserError as `worst_batches` and `synthetic_batch`.
    """
    if tokens is not None or not at_hand(recipe):
        return [synthetic_batch(config, recipe, tokens or recipe.data.max_length)]
    try:
        return worst_batches(recipe, config)
    except (OSError, ValueError, ImportError):  # no processor here: the model has not been downloaded
        return [synthetic_batch(config, recipe, recipe.data.max_length)]


def worst_batches(recipe: Recipe, config: PretrainedConfig) -> list[Batch]:
    """The micro-batch of the longest samples, and that of the largest pictures where these are others.

    Picture sizes are read from the files' headers; samples that are long by their characters and pictures are
    tokenised; what is longest then goes through the run's own collator.

    Raises:
        UserError: the data or a picture cannot be read, or a sample is longer than `data.max_length`.
        OSError, ValueError, ImportError: the processor cannot be loaded.
    """
    found, count = _scan(recipe.model, recipe.data), recipe.train.micro_batch_size
    chosen = [found.longest[:count], found.largest[:count]]
    if set(chosen[0]) == set(chosen[1]):
        del chosen[1]
    return [_batch(found, [found.rows[index] for index in indices], config) for indices in chosen]


@dataclass(frozen=True)
class _Scan:
    """What is known of the data: the indices of its longest samples and of those with the largest pictures, first the
    most, and its lengths in words.
    """

    rows: Any
    collator: Collator
    longest: list[int]
    largest: list[int]
    facts: str


@lru_cache(maxsize=4)  # edits of a recipe are planned one after another
def _scan(spec: Model, data: Data) -> _Scan:
    processor = AutoProcessor.from_pretrained(spec.id, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    limit_pictures(processor, config_of(spec), data.max_image_tokens)
    rows, collator = load_data(data, "train"), Collator(processor, data.max_length)
    pictures, lengths, candidates = _sizes(rows, processor, collator)
    longest = sorted(candidates, key=lambda index: candidates[index], reverse=True)
    largest = sorted(range(len(rows)), key=lambda index: (pictures[index], candidates.get(index, 0)), reverse=True)
    cuts = quantiles(lengths, n=100) if len(lengths) > 1 else lengths * 99
    facts = (
        f"{len(rows)} samples; tokens: median {cuts[49]:.0f}, p99 {cuts[98]:.0f}, largest "
        f"{max(candidates.values())}; image tokens: largest {max(pictures)}"
    )
    return _Scan(rows, collator, longest, largest[:CANDIDATES], facts)


def _batch(found: _Scan, rows: Sequence[Mapping[str, Any]], config: PretrainedConfig) -> Batch:
    inputs = found.collator(rows)
    ids_BS = inputs["input_ids"]
    pictures_B = (ids_BS == config.image_token_id).sum(dim=1)
    return Batch(inputs, ids_BS.shape[1], int(pictures_B.max()), f"the worst of the training data ({found.facts})")


def _sizes(rows: Any, processor: ProcessorMixin, collator: Collator) -> tuple[list[int], list[int], dict[int, int]]:
    """(image tokens of all rows, lengths of an even choice of rows, lengths of the candidates for the longest)."""

    @cache
    def tokens_of(size: tuple[int, int]) -> int:
        width, height = size
        if hasattr(processor, "_get_num_multimodal_tokens"):  # what vLLM asks processors
            found = processor._get_num_multimodal_tokens(image_sizes=[[height, width]])
            return int(found["num_image_tokens"][0])
        blank = {"turns": [{"role": "user", "text": IMAGE}], "images": [_png(size)], "task": ""}
        prompt: int = collator.prompts([blank])["input_ids"].shape[1]
        return prompt

    pictures = [sum(tokens_of(_size(image)) for image in row["images"]) for row in rows]
    characters = [sum(len(turn["text"]) for turn in row["turns"]) for row in rows]
    estimate = [many + count // CHARACTERS for many, count in zip(pictures, characters, strict=True)]
    candidates = sorted(range(len(rows)), key=lambda index: estimate[index], reverse=True)[:CANDIDATES]
    even = range(0, len(rows), max(1, len(rows) // LOOKED_AT))

    def length(index: int) -> int:
        turns = rows[index]["turns"]
        marks: int = sum(turn["text"].count(IMAGE) for turn in turns)
        return len(collator.tokens(turns)) - marks + pictures[index]

    return pictures, [length(index) for index in even], {index: length(index) for index in candidates}


def _size(image: Mapping[str, Any]) -> tuple[int, int]:
    """(width, height), from the header."""
    with Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]) as opened:
        size: tuple[int, int] = opened.size
        return size


def _png(size: tuple[int, int]) -> dict[str, Any]:
    """A blank picture as a row holds one."""
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return {"path": None, "bytes": file.getvalue()}
