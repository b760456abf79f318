"""How far a card goes: the most samples, and the longest, with which a recipe fits it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from transformers import PretrainedConfig

from qmixlora.errors import UserError
from qmixlora.recipe import Recipe, edited

from .planner import Plan, plan, room_on
from .simulation.batch import MADE_UP, synthetic_batch

MOST_SAMPLES, MOST_TOKENS = 64, 32768  # nobody asks for more


@dataclass(frozen=True)
class Largest:
    """The most samples of the planned length, and the longest samples of the planned number, that a card holds."""

    micro_batch_size: int
    tokens: int


def largest(recipe: Recipe, config: PretrainedConfig, worst: Plan, card: int, residual: int) -> Largest:
    """The most samples, and the longest, that a card of so many bytes holds, beginning with the recipe's own plan.

    Samples are made up, with images no larger than those of the data, where it was measured.
    """
    samples, tokens = recipe.train.micro_batch_size, worst.batch.tokens
    images = None if worst.batch.source == MADE_UP else worst.batch.image_tokens

    def size(changed: Recipe, tokens: int) -> int:
        batch = synthetic_batch(config, changed, tokens, images)
        return plan(changed, batch=batch, residual=residual).peak_with_loading

    def of_samples(count: int) -> int:
        return size(edited(recipe, ["train.batch_tokens=", f"train.micro_batch_size={count}"]), tokens)

    def of_tokens(count: int) -> int:
        return size(recipe, count)

    room, planned = room_on(card), worst.peak_with_loading
    return Largest(
        most_that_fit(of_samples, samples, planned if recipe.train.batch_tokens is None else None, room, MOST_SAMPLES),
        most_that_fit(of_tokens, tokens, planned, room, MOST_TOKENS, 64),
    )


def most_that_fit(
    size: Callable[[int], int], start: int, planned: int | None, room: int, limit: int, unit: int = 1
) -> int:
    """The largest multiple of `unit` up to `limit` whose size is within the room; 0 if there is none. `planned` is the
    size of `start`, where it is known; sizes grow with the count.

    `size` may raise UserError for a count, such as a sample that is too short for its image: then more are tried.
    """
    best, low, high = 0, 0, limit // unit + 1  # in units: the most that fit, all too few, and all too many
    sizes: dict[int, int] = {} if planned is None else {start: planned}
    count = start
    while True:
        if count not in sizes:
            with suppress(UserError):
                sizes[count] = size(count)
        if (known := sizes.get(count)) is not None and known > room:
            high = min(high, math.ceil(count / unit))
        else:
            low = min(count, limit) // unit
            best = best if known is None else low
        guess = _by_line(list(sizes.items())[-2:], room)
        if high - low < 2 or (guess is not None and guess // unit == best == low):
            return best * unit
        if guess is None:  # one size alone, or the same of two, such as that of the optimiser's own step
            guess = max(2 * count, (low + 1) * unit) if best == low else count / 2
        if guess // unit >= high > limit // unit:
            guess = (high - 1) * unit
        inside = low < guess // unit < high
        count = int(guess // unit if inside else (low + high) // 2) * unit


def _by_line(sizes: Sequence[tuple[int, int]], room: int) -> float | None:
    """The count that fills the room, by two sizes: they grow nearly in proportion. None where these do not tell."""
    if len(sizes) < 2 or sizes[0][1] == sizes[1][1]:
        return None
    (before, size_before), (count, size) = sizes
    return count + (room - size) * (count - before) / (size - size_before)
