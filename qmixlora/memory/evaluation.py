"""The memory of evaluation: the validation loss and answers inside a run, and answers as of `qmixlora eval`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from qmixlora.device import GIB
from qmixlora.recipe import Recipe, edited

from .architectures import config_of
from .cards import CONTEXT
from .largest import most_that_fit
from .planner import WORKSPACES, optimizer_states, room_on
from .simulation.batch import Batch, batches_of
from .simulation.step import Step, simulate
from .simulation.work import prefill, validation

# levers that a model has in a run alone: `qmixlora eval` opens it with its vision tower, and with its MLPs as they are
OUTSIDE = ("train.cache_features=false", "train.mlp_chunk=")


@dataclass(frozen=True)
class EvaluationPlan:
    """Bytes on the card while `samples` of `tokens` are evaluated at a time. Beside what a run holds: `validation`, its
    loss (None: the recipe has no validation data), and `generation_in_run`, answers of `new_tokens` (None: without
    `train.eval_generate`). `generation` is of such answers in `qmixlora eval`.
    """

    samples: int
    tokens: int
    new_tokens: int
    validation: int | None
    generation_in_run: int | None
    generation: int
    card: int | None
    samples_that_fit: int | None = None  # where `samples` do not, and fewer do

    @property
    def peak(self) -> int:
        """Bytes on the card."""
        return max(self.validation or 0, self.generation_in_run or 0, self.generation)

    @property
    def fits(self) -> bool | None:
        """Whether it leaves the margin of the card free; None without a card."""
        return None if self.card is None else self.peak <= room_on(self.card)

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `qmixlora plan`, sizes in GiB."""
        return {
            "samples": self.samples,
            "tokens": self.tokens,
            "new_tokens": self.new_tokens,
            "validation_gib": None if self.validation is None else self.validation / GIB,
            "generation_in_run_gib": None if self.generation_in_run is None else self.generation_in_run / GIB,
            "generation_gib": self.generation / GIB,
            "fits": self.fits,
            "samples_that_fit": self.samples_that_fit,
        }


def plan_evaluation(
    recipe: Recipe, *, card: int | None = None, tokens: int | None = None, residual: int = 0
) -> EvaluationPlan:
    """Plan the evaluation of `train.eval_batch_size` samples as long as those of the training data; prompts are counted
    as long as whole samples. `card` and `residual` are in bytes, as in `plan`.

    Raises UserError as `plan`.
    """
    planned = _planned(recipe, card, tokens, residual)
    if planned.fits is not False or card is None:
        return planned

    def peak(samples: int) -> int:
        return _planned(edited(recipe, [f"train.eval_batch_size={samples}"]), card, tokens, residual).peak

    fewer = most_that_fit(peak, planned.samples, planned.peak, room_on(card), planned.samples)
    return replace(planned, samples_that_fit=fewer or None)


def _planned(recipe: Recipe, card: int | None, tokens: int | None, residual: int) -> EvaluationPlan:
    config, samples, new_tokens = config_of(recipe.model), recipe.train.eval_batch_size, recipe.train.max_new_tokens
    batches = batches_of(edited(recipe, ["train.batch_tokens=", f"train.micro_batch_size={samples}"]), config, tokens)
    layers = int(config.get_text_config().num_hidden_layers)

    def on_card(step: Step) -> int:
        sizes = step.sizes
        weights = sizes.nf4_weights + sizes.kept_out_weights + sizes.adapter + sizes.routers + sizes.projector
        return weights + step.gaps + CONTEXT + WORKSPACES + residual

    def of_a_run(step: Step, batch: Batch) -> int:
        """The optimiser's states and the routing record, which stay while a run evaluates."""
        states, _ = optimizer_states(recipe, step.sizes)
        return states + step.sizes.routing_sums * batch.tasks

    def loss(batch: Batch) -> int:
        step = simulate(recipe, config, batch, validation)
        return on_card(step) + of_a_run(step, batch) + step.peak

    def answers(step: Step, batch: Batch) -> int:
        """The most of the prompt's pass, or the last token: the cache has grown, and keys are copied to grow."""
        cache = step.sizes.activations_saved * (batch.tokens + new_tokens) // batch.tokens
        on_host = ("segments",)
        tensors = (value for name, value in batch.inputs.items() if isinstance(value, Tensor) and name not in on_host)
        given = sum(tensor.nbytes for tensor in tensors)
        return on_card(step) + max(step.peak, given + cache + cache // (2 * layers))

    def answers_in_run(batch: Batch) -> int:
        step = simulate(recipe, config, batch, prefill)
        return answers(step, batch) + of_a_run(step, batch)

    def answers_outside(batch: Batch) -> int:
        return answers(simulate(edited(recipe, OUTSIDE), config, batch, prefill), batch)

    return EvaluationPlan(
        samples,
        max(batch.tokens for batch in batches),
        new_tokens,
        max(map(loss, batches)) if recipe.data.validation else None,
        max(map(answers_in_run, batches)) if recipe.train.eval_generate else None,
        max(map(answers_outside, batches)),
        card,
    )
