"""The micro-batch that is planned: one that a recipe's data could hold, or the worst of the data at hand.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from qmixlora.backbone.image_tokens.limits import picture_batch
from qmixlora.data import IGNORED
from qmixlora.recipe import Recipe


@dataclass(frozen=True)
class Batch:
    """Inputs as the collator makes them, and how long their samples are (S)."""

    inputs: dict[str, Any]
    tokens: int
    image_tokens: int = 0  # of the largest picture
    source: str = "one picture per sample, half of the text supervised"

    def to_dict(self) -> dict[str, Any]:
        """What a plan says of it."""
        return {
            "samples": len(self.inputs["input_ids"]),
            "tokens": self.tokens,
            "image_tokens": self.image_tokens,
            "source": self.source,
        }


def synthetic_batch(config: PretrainedConfig, recipe: Recipe, tokens: int) -> Batch:
    """One picture per sample, then text, of which the latter half is answer; samples of `tokens`.

    Raises:
        UserError: the family's pictures cannot be planned, or do not fit in `tokens`.
    """
    rows = recipe.train.micro_batch_size
    ids_BS, pictures = picture_batch(config, rows, tokens, recipe.data.max_image_tokens)
    text = tokens - 1 - int((ids_BS[0] == config.image_token_id).nonzero().max())
    labels_BS = torch.full_like(ids_BS, IGNORED)
    labels_BS[:, -(text // 2) :] = 1
    inputs = {
        "input_ids": ids_BS,
        "attention_mask": torch.ones_like(ids_BS),
        "labels": labels_BS,
        "routing_mask": labels_BS == IGNORED,
        "tasks": ["plan"] * rows,
        **pictures,
    }
    return Batch(inputs, tokens, int((ids_BS[0] == config.image_token_id).sum()))
