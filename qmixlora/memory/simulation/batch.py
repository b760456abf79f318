"""The micro-batches that are planned: the worst of the data at hand, or one that a recipe's data could hold.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PretrainedConfig, ProcessorMixin

from qmixlora.backbone import load_processor
from qmixlora.backbone.image_tokens import largest_images, placeholder_of
from qmixlora.backbone.image_tokens.families import is_measured
from qmixlora.backbone.image_tokens.family import TEXT
from qmixlora.data import IGNORED, Collator, sizes_of, taught, token_batches
from qmixlora.data.checking.survey import Survey
from qmixlora.errors import path_meant
from qmixlora.recipe import Data, Model, Recipe
from qmixlora.session import make_collator

from ..architectures import config_of

MODEL_ALONE = "-"  # data.train where a model is planned by its name alone
MADE_UP = "made up: one image per sample, half of the text supervised"


@dataclass(frozen=True)
class Batch:
    """Inputs as the collator makes them, and how long their samples are (S)."""

    inputs: dict[str, Any]
    tokens: int
    image_tokens: int = 0  # of the sample with the most
    source: str = MADE_UP
    tasks: int = 1  # in the training data, as far as it is known
    unmeasured: str | None = None  # why the recipe's data was not measured

    def to_dict(self) -> dict[str, Any]:
        """The batch in a plan's JSON."""
        return {
            "samples": len(self.inputs["input_ids"]),
            "tokens": self.tokens,
            "image_tokens": self.image_tokens,
            "source": self.source,
            "unmeasured": self.unmeasured,
        }


def is_at_hand(recipe: Recipe) -> bool:
    """Whether the training data is on this machine, in files or folders."""
    return not _missing(recipe)


def _missing(recipe: Recipe) -> list[str]:
    """The sources of training data that are no file or folder here."""
    return [source for source in recipe.data.sources if not Path(source).exists()]


def batches_of(recipe: Recipe, config: PretrainedConfig, tokens: int | None) -> list[Batch]:
    """The batches to plan with: the worst of the data at hand, unless `tokens` says how long samples are; without
    data, or without a processor to measure it with, a synthetic one that says so, and why.

    Raises UserError as `worst_batches` and `synthetic_batch`.
    """
    if tokens is not None:
        return [synthetic_batch(config, recipe, tokens)]
    unmeasured = None
    if missing := [source for source in _missing(recipe) if source != MODEL_ALONE]:
        unmeasured = f"there is no {missing[0]} here. {path_meant(Path(missing[0]))}".rstrip()
    if is_at_hand(recipe):
        try:
            return worst_batches(recipe, config)
        except (OSError, ValueError, ImportError) as error:  # no processor here: the model has not been downloaded
            reason = str(error).strip().partition("\n")[0]
            unmeasured = f"{type(error).__name__}: {reason}"
    return [replace(synthetic_batch(config, recipe, recipe.data.max_length), unmeasured=unmeasured)]


def worst_batches(recipe: Recipe, config: PretrainedConfig) -> list[Batch]:
    """The micro-batch of the longest samples, and that of the largest images where these are others, as the run's own
    collator makes them. Of micro-batches that are filled by tokens: the one of most tokens, and that of most in images.

    Raises:
        UserError: the data or an image cannot be read, or a sample is longer than `data.max_length`.
        OSError, ValueError, ImportError: the processor cannot be loaded.
    """
    rows, collator, facts = _surveyed(recipe.model, recipe.data)
    if recipe.train.batch_tokens is None:
        count = recipe.train.micro_batch_size
        chosen = [facts.longest[:count], facts.largest_images[:count]]
    else:
        chosen = _worst_by_tokens(recipe)
    if set(chosen[0]) == set(chosen[1]):
        del chosen[1]
    return [_batch([rows[index] for index in indices], collator, config, facts) for indices in chosen]


@lru_cache(maxsize=4)
def _worst_by_tokens(recipe: Recipe) -> list[list[int]]:
    rows, collator, _ = _surveyed(recipe.model, recipe.data)
    assert recipe.train.batch_tokens is not None, "asked for such micro-batches alone"
    lengths, images = sizes_of(rows, collator)
    batches = token_batches(lengths, recipe.train.batch_tokens)
    longest = max(batches, key=lambda batch: len(batch) * lengths[batch[0]])
    return [longest, max(batches, key=lambda batch: sum(images[index] for index in batch))]


def synthetic_batch(config: PretrainedConfig, recipe: Recipe, tokens: int, image_tokens: int | None = None) -> Batch:
    """One image per sample, then text, of which the latter half is answer; samples of `tokens`. The image is the
    largest within `data.max_image_tokens`, and within `image_tokens` where they are given (0: there is none).

    Raises:
        UserError: the family's images cannot be planned, or do not fit in `tokens`.
    """
    spec = recipe.train
    rows = spec.micro_batch_size if spec.batch_tokens is None else max(1, spec.batch_tokens // tokens)
    if image_tokens == 0:
        ids_BS, images = torch.full((rows, tokens), TEXT), dict[str, torch.Tensor]()
    else:
        ids_BS, images = _largest(config, recipe, rows, tokens, image_tokens)
    is_image_S = ids_BS[0] == placeholder_of(config)
    text = tokens - 1 - int(is_image_S.nonzero().max()) if images else tokens - 1
    labels_BS = torch.full_like(ids_BS, IGNORED)
    labels_BS[:, -(text // 2) :] = 1
    inputs = {
        "input_ids": ids_BS,
        "attention_mask": torch.ones_like(ids_BS),
        "labels": labels_BS,
        "routing_mask": labels_BS == IGNORED,
        "tasks": ["plan"] * rows,
        **{name: _cast(tensor, getattr(torch, recipe.model.dtype)) for name, tensor in images.items()},
    }
    return Batch(inputs, tokens, int(is_image_S.sum()))


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of images as the collator gives it."""
    return tensor.to(dtype) if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() else tensor


def _largest(
    config: PretrainedConfig, recipe: Recipe, rows: int, tokens: int, image_tokens: int | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`largest_images`, measured with the model's processor where that is how the family is known, and it is here."""
    processor = _processor_here(recipe.model) if is_measured(config) else None
    budgets = [budget for budget in (recipe.data.max_image_tokens, image_tokens) if budget is not None]
    return largest_images(config, rows, tokens, min(budgets, default=None), processor)


@lru_cache(maxsize=1)
def _processor_here(spec: Model) -> ProcessorMixin | None:
    try:
        return load_processor(spec, None)
    except (OSError, ValueError, ImportError):
        return None


@lru_cache(maxsize=4)  # edits of a recipe are planned one after another
def _surveyed(spec: Model, data: Data) -> tuple[Dataset, Collator, Survey]:
    processor = load_processor(spec, data.max_image_tokens, config_of(spec))
    collator = make_collator(Recipe(model=spec, data=data), processor)
    found = taught(data, collator, ["train"])
    facts = found.verdicts["train"].survey
    assert facts is not None, "rows are left"
    return found.rows["train"], collator, facts


def _batch(rows: Sequence[Any], collator: Collator, config: PretrainedConfig, facts: Survey) -> Batch:
    inputs = collator(rows)
    ids_BS = inputs["input_ids"]
    image_tokens_B = (ids_BS == placeholder_of(config)).sum(dim=1)
    source = f"the worst of the training data ({facts})"
    return Batch(inputs, ids_BS.shape[1], int(image_tokens_B.max()), source, facts.tasks)
