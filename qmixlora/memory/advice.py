"""Advice: edits of a recipe that save memory, each planned like the recipe itself, and how far a card goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from transformers import PretrainedConfig

from qmixlora.backbone.levers.table import Facts, Lever, lever_edits
from qmixlora.device import GIB
from qmixlora.errors import UserError
from qmixlora.recipe import Edit, Recipe, edited

from .architectures import config_of
from .parallel import side_by_side
from .planner import MARGIN, Plan, plan
from .residuals import residual_of
from .simulation.batch import Batch, batches_of, is_at_hand, synthetic_batch

WORTH = GIB // 100  # an edit that saves less is not mentioned
MOST_SAMPLES, MOST_TOKENS = 64, 32768  # nobody asks for more


@dataclass(frozen=True)
class Saving:
    """A lever's edit of a recipe, the bytes that it saves at the peak, and whether the recipe then fits the card."""

    lever: Lever
    edit: Edit
    saves: int
    fits: bool | None  # without a card

    def to_dict(self) -> dict[str, Any]:
        """The saving in a plan's JSON, in GiB."""
        known = {} if self.fits is None else {"fits": self.fits}
        return {"edit": str(self.edit), "saves_gib": self.saves / GIB, **known}


@dataclass(frozen=True)
class Largest:
    """The most samples of the planned length, and the longest samples of the planned number, that a card holds."""

    micro_batch_size: int
    tokens: int


@dataclass(frozen=True)
class Advice:
    """The plan of the worst batch; the edits that save memory, largest saving first; with a card, how far it goes."""

    plan: Plan
    savings: tuple[Saving, ...]
    largest: Largest | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `qmixlora plan`, sizes in GiB."""
        card = self.plan.card
        return {
            **self.plan.to_dict(),
            "needed_margin_gib": None if card is None else MARGIN * card / GIB,
            "advice": [saving.to_dict() for saving in self.savings],
            "largest": None if self.largest is None else asdict(self.largest),
        }


def plan_with_advice(recipe: Recipe, *, card: int | None = None, tokens: int | None = None) -> Advice:
    """Plan the worst batch of a recipe, and every edit of the table of levers. `card` is in bytes.

    Raises UserError as `plan` and `batches_of`.
    """
    config = config_of(recipe.model)
    batches = batches_of(recipe, config, tokens)
    residual = residual_of(recipe.model.id)  # asked for here: forked processes must not ask CUDA for anything
    worst = _worst(recipe, card, batches, residual)
    facts = Facts(int(config.get_text_config().num_hidden_layers), worst.batch.image_tokens)

    def saving(lever: Lever, edit: Edit) -> Saving:
        try:
            changed = edit.apply(recipe)
            other = _worst(changed, card, _rebatched(batches, recipe, changed, config, tokens), residual)
        except UserError:  # not with this model, such as an lm_head that is tied
            return Saving(lever, edit, 0, None)
        return Saving(lever, edit, worst.peak - other.peak, other.fits)

    savings = side_by_side([partial(saving, lever, edit) for lever, edit in lever_edits(recipe, facts)])
    worthy = sorted((s for s in savings if s.saves >= WORTH), key=lambda s: -s.saves)
    largest = None if card is None else _largest(recipe, worst, card, residual)
    return Advice(worst, tuple(worthy), largest)


def _worst(recipe: Recipe, card: int | None, batches: Sequence[Batch], residual: int) -> Plan:
    plans = (plan(recipe, card=card, batch=batch, residual=residual) for batch in batches)
    return max(plans, key=lambda one: one.peak)


def _rebatched(
    batches: list[Batch], recipe: Recipe, changed: Recipe, config: PretrainedConfig, tokens: int | None
) -> list[Batch]:
    """The batches of an edited recipe. Where an image takes fewer tokens, its sample is as much shorter."""
    budget, rows = changed.data.max_image_tokens, changed.train.micro_batch_size
    if budget == recipe.data.max_image_tokens and rows == recipe.train.micro_batch_size:
        return batches
    if tokens is None and is_at_hand(recipe):
        return batches_of(changed, config, None)
    shorter = 0 if budget is None else max(0, batches[0].image_tokens - budget)
    return [synthetic_batch(config, changed, batches[0].tokens - shorter)]


def _largest(recipe: Recipe, worst: Plan, card: int, residual: int) -> Largest:
    config, tokens = config_of(recipe.model), worst.batch.tokens

    def peak_of_samples(count: int) -> int:
        changed = edited(recipe, [f"train.micro_batch_size={count}"])
        return plan(changed, batch=synthetic_batch(config, changed, tokens)).peak

    def peak_of_tokens(count: int) -> int:
        return plan(recipe, batch=synthetic_batch(config, recipe, count)).peak

    room = int((1 - MARGIN) * card) - residual
    samples, longest = side_by_side(
        [
            partial(_most, peak_of_samples, recipe.train.micro_batch_size, room, MOST_SAMPLES, 1),
            partial(_most, peak_of_tokens, tokens, room, MOST_TOKENS, 64),
        ]
    )
    return Largest(samples, longest)


def _most(peak: Callable[[int], int], start: int, room: int, limit: int, unit: int) -> int:
    """The largest multiple of `unit` up to `limit` whose peak is in the room; 0 if there is none.

    Peaks grow nearly in proportion: the line through two of them says where to look.
    """
    tried: dict[int, int] = {}

    def known(count: int) -> int:
        if count not in tried:
            try:
                tried[count] = peak(count)
            except UserError:  # such as too short for an image
                tried[count] = -1
        return tried[count]

    low, high = start, 2 * start
    slope = max((known(high) - known(low)) / (high - low), 1e-9)
    best = min(limit, int(low + (room - known(low)) / slope)) // unit * unit
    while best > 0 and known(best) > room:
        best -= unit
    return best if best > 0 and known(best) >= 0 else 0
