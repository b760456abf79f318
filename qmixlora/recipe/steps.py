"""The optimiser steps of a recipe."""

from __future__ import annotations

import math

from .schema import Recipe


def steps_of(recipe: Recipe, samples: int, batch: float | None = None) -> int:
    """The optimiser steps of a run on so many samples, as transformers' Trainer counts them; `batch` is how many a
    micro-batch has (on average, where it is filled by tokens).
    """
    spec = recipe.train
    if spec.max_steps is not None:
        return spec.max_steps
    batches = math.ceil(samples / (batch or spec.micro_batch_size))
    return math.ceil(spec.epochs * -(-batches // spec.gradient_accumulation))
