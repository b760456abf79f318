"""Advice: edits of a recipe that save memory, each planned like the recipe itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from transformers import PretrainedConfig

from qmixlora.backbone.levers.table import Facts, Lever, lever_edits, to_the_end
from qmixlora.device import GIB
from qmixlora.errors import UserError
from qmixlora.parallel import side_by_side
from qmixlora.recipe import Edit, Recipe

from .architectures import config_of
from .evaluation import EvaluationPlan, plan_evaluation
from .largest import Largest, largest
from .planner import MARGIN, Plan, plan
from .residuals import residual_of
from .simulation.batch import Batch, batches_of, is_at_hand, synthetic_batch
from .simulation.depth import shallow_model
from .simulation.step import period_of
from .together import Option, Together, smallest_set

WORTH = GIB // 100  # an edit that saves less is not mentioned


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
class Advice:
    """The plan of the worst batch, and of evaluation; the edits that save memory, largest saving first. With a card,
    how far it goes; where the recipe does not fit it, the smallest sets of edits with which it does, if there are any.
    """

    plan: Plan
    savings: tuple[Saving, ...]
    largest: Largest | None = None
    evaluation: EvaluationPlan | None = None
    smallest: Together | None = None
    smallest_that_learns_the_same: Together | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `qmixlora plan`, sizes in GiB."""
        card = self.plan.card
        return {
            **self.plan.to_dict(),
            "needed_margin_gib": None if card is None else MARGIN * card / GIB,
            "advice": [saving.to_dict() for saving in self.savings],
            "smallest": [one.to_dict() for one in (self.smallest, self.smallest_that_learns_the_same) if one],
            "largest": None if self.largest is None else asdict(self.largest),
            "evaluation": None if self.evaluation is None else self.evaluation.to_dict(),
        }


@dataclass(frozen=True)
class _Setting:
    """What a recipe is planned with: the batches of its data, the card and the residual, both in bytes."""

    recipe: Recipe
    config: PretrainedConfig
    batches: list[Batch]
    tokens: int | None
    card: int | None
    residual: int

    def worst(self) -> Plan:
        """The plan of the batch that takes the most."""
        plans = (plan(self.recipe, card=self.card, batch=batch, residual=self.residual) for batch in self.batches)
        return max(plans, key=lambda one: one.peak_with_loading)

    def worst_and_largest(self) -> tuple[Plan, Largest | None]:
        """The worst plan; with a card, how far it goes, for which that plan is a beginning."""
        worst = self.worst()
        if self.card is None:
            return worst, None
        return worst, largest(self.recipe, self.config, worst, self.card, self.residual)

    def planned(self, edit: Edit) -> Plan | None:
        """The plan with an edit; None where it is not for this model (such as an lm_head that is tied)."""
        try:
            changed = edit.apply(self.recipe)
            return replace(self, recipe=changed, batches=self._rebatched(changed)).worst()
        except UserError:
            return None

    def option(self, lever: Lever, edit: Edit) -> Option | None:
        """The edit with its plan."""
        planned = self.planned(edit)
        return None if planned is None else Option(lever, edit, planned)

    def evaluation(self) -> EvaluationPlan:
        return plan_evaluation(self.recipe, card=self.card, tokens=self.tokens, residual=self.residual)

    def _rebatched(self, changed: Recipe) -> list[Batch]:
        """The batches of an edited recipe. Where an image takes fewer tokens, its sample is as much shorter."""
        budget = changed.data.max_image_tokens
        if budget == self.recipe.data.max_image_tokens and _batching(changed) == _batching(self.recipe):
            return self.batches
        if self.tokens is None and is_at_hand(self.recipe):
            return batches_of(changed, self.config, None)
        shorter = 0 if budget is None else max(0, self.batches[0].image_tokens - budget)
        return [synthetic_batch(self.config, changed, self.batches[0].tokens - shorter)]


def plan_worst(recipe: Recipe, card: int, residual: int | None = None) -> Plan:
    """Plan the worst batch of a recipe alone, on a card of so many bytes; `residual` is in bytes, too (default:
    `residual_of` the model).

    Raises UserError as `plan_with_advice`.
    """
    config = config_of(recipe.model)
    missed = residual_of(recipe.model.id) if residual is None else residual
    return _Setting(recipe, config, batches_of(recipe, config, None), None, card, missed).worst()


def _batching(recipe: Recipe) -> tuple[int, int | None]:
    return recipe.train.micro_batch_size, recipe.train.batch_tokens


def plan_with_advice(
    recipe: Recipe,
    *,
    card: int | None = None,
    tokens: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Advice:
    """Plan the worst batch of a recipe, its evaluation, and every edit of the table of levers. `card` is in bytes;
    `on_progress` is told the numbers of plans done and to do.

    Raises UserError as `plan` and `batches_of`.
    """
    config = config_of(recipe.model)
    residual = residual_of(recipe.model.id)  # asked for here: forked processes must not ask CUDA for anything
    shallow_model(recipe, config, period_of(recipe))  # found here: forked processes find it known
    setting = _Setting(recipe, config, batches_of(recipe, config, tokens), tokens, card, residual)
    images = max(batch.image_tokens for batch in setting.batches)
    facts = Facts(int(config.get_text_config().num_hidden_layers), images)
    edits = [partial(setting.option, lever, edit) for lever, edit in lever_edits(recipe, facts)]
    # what takes longest comes first, so that nothing is waited for at the end
    work: list[Callable[[], Any]] = [setting.worst_and_largest, setting.evaluation, *edits]
    (worst, largest), evaluation, *found = side_by_side(work, on_progress)
    options = [option for option in found if option is not None]
    savings = [Saving(o.lever, o.edit, worst.peak - o.plan.peak, o.plan.fits) for o in options]
    worthy = sorted((s for s in savings if s.saves >= WORTH), key=lambda s: -s.saves)
    if worst.fits in (None, True):
        return Advice(worst, tuple(worthy), largest, evaluation)
    if not any(option.plan.fits for option in options):
        options += _last_steps(setting, options, facts)
    smallest = smallest_set(worst, options, setting.planned)
    harmless = [option for option in options if option.lever.learns_the_same]
    as_before = smallest and not smallest.learns_the_same and smallest_set(worst, harmless, setting.planned)
    return Advice(worst, tuple(worthy), largest, evaluation, smallest, as_before or None)


def _last_steps(setting: _Setting, options: Sequence[Option], facts: Facts) -> list[Option]:
    """The levers whose next step is not their last one, pulled to the end."""
    ends = [(option, to_the_end(option.lever, setting.recipe, facts)) for option in options]
    further = [partial(setting.option, option.lever, edit) for option, edit in ends if edit != option.edit]
    return [option for option in side_by_side(further) if option is not None]
