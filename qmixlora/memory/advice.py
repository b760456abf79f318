"""What to change: edits of a recipe that save memory, each planned like the recipe itself, and how far a card goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from transformers import PretrainedConfig

from qmixlora.data.survey import at_hand, batches_of
from qmixlora.errors import UserError
from qmixlora.recipe import Recipe, edited
from qmixlora.training.probe import probe

from .architectures import config_of
from .cards import GIB
from .parallel import side_by_side
from .planner import MARGIN, Plan, plan
from .residuals import residual_of
from .simulation.batch import Batch, synthetic_batch

WORTH = GIB // 100  # an edit that saves less is not mentioned
MOST_SAMPLES, MOST_TOKENS = 64, 32768  # nobody asks for more


def plan_with_advice(
    recipe: Recipe, *, card: int | None = None, tokens: int | None = None, probing: bool = False
) -> dict[str, Any]:
    """`Plan.to_dict` of the worst batch, with `advice`: a list of `edit` (overrides as on the command line),
    `saves_gib` and, with a card, `fits`, what saves most first; and with a card `largest`: the micro-batch and the
    tokens of a sample that still fit. With `probing` also `probe`: the plan against two real steps on this machine.

    Raises UserError as `plan`, `batches_of` and `probe`.
    """
    config = config_of(recipe.model)
    batches = batches_of(recipe, config, tokens)
    found = _worst(recipe, card, batches)
    probed = {"probe": probe(recipe, found).to_dict()} if probing else {}
    edits = list(_edits(recipe, found.batch, int(config.get_text_config().num_hidden_layers)))

    def saved(edit: list[str]) -> tuple[int, bool | None]:
        try:
            changed = edited(recipe, edit)
            other = _worst(changed, card, _rebatched(batches, recipe, changed, config, tokens))
        except UserError:  # not with this model, such as an lm_head that is tied
            return 0, None
        return found.peak - other.peak, other.fits

    savings = side_by_side([partial(saved, edit) for edit in edits])
    advice = [
        {"edit": " ".join(edit), "saves_gib": size / GIB} | ({} if card is None else {"fits": fits})
        for edit, (size, fits) in sorted(zip(edits, savings, strict=True), key=lambda pair: -pair[1][0])
        if size >= WORTH
    ]
    return {
        **found.to_dict(),
        **probed,
        "needed_margin_gib": None if card is None else MARGIN * card / GIB,
        "advice": advice,
        "largest": None if card is None else _largest(recipe, found, card),
    }


def _worst(recipe: Recipe, card: int | None, batches: Sequence[Batch]) -> Plan:
    residual = residual_of(recipe.model.id)
    plans = (plan(recipe, card=card, batch=batch, residual=residual) for batch in batches)
    return max(plans, key=lambda found: found.peak)


def _rebatched(
    batches: list[Batch], recipe: Recipe, changed: Recipe, config: PretrainedConfig, tokens: int | None
) -> list[Batch]:
    """The batches of an edited recipe. Where a picture takes fewer tokens, its sample is as much shorter."""
    budget, rows = changed.data.max_image_tokens, changed.train.micro_batch_size
    if budget == recipe.data.max_image_tokens and rows == recipe.train.micro_batch_size:
        return batches
    if tokens is None and at_hand(recipe):
        return batches_of(changed, config, None)
    shorter = 0 if budget is None else max(0, batches[0].image_tokens - budget)
    return [synthetic_batch(config, changed, batches[0].tokens - shorter)]


def _edits(recipe: Recipe, batch: Batch, layers: int) -> Iterator[list[str]]:
    """What could be changed: first what changes nothing of what is learned, then what changes little, then the rest."""
    model, spec, checkpointing = recipe.model, recipe.train, recipe.train.checkpointing
    if not checkpointing.enabled or checkpointing.every_n_layers > 1:
        yield ["train.checkpointing.enabled=true", "train.checkpointing.every_n_layers=1"]
    elif not checkpointing.offload:
        yield ["train.checkpointing.offload=true"]
    if spec.micro_batch_size > 1:
        half = spec.micro_batch_size // 2
        steps = spec.gradient_accumulation * spec.micro_batch_size // half
        yield [f"train.micro_batch_size={half}", f"train.gradient_accumulation={steps}"]
    if spec.loss_chunk is None or spec.loss_chunk > 32:
        yield [f"train.loss_chunk={32 if spec.loss_chunk else 128}"]
    if not model.offload_embeddings and model.quantize_embeddings == "none":
        yield ["model.offload_embeddings=true"]
    if checkpointing.enabled and checkpointing.every_n_layers == 1 and model.stream_layers < layers:
        yield [f"model.stream_layers={(model.stream_layers + layers + 1) // 2}"]
    if spec.optimizer == "adamw":
        yield ["train.optimizer=paged_adamw_8bit"]
    if model.quantize_lm_head == "none":
        yield ["model.quantize_lm_head=nf4"]
    if batch.image_tokens > 1:
        yield [f"data.max_image_tokens={batch.image_tokens * 3 // 5}"]
    if recipe.adapter.train_projector:
        yield ["adapter.train_projector=false", "train.cache_features=true"]


def _largest(recipe: Recipe, found: Plan, card: int) -> dict[str, int]:
    """The most samples of the planned length, and the longest samples of the planned number, that leave the margin."""
    config, tokens = config_of(recipe.model), found.batch.tokens
    residual = residual_of(recipe.model.id)

    def peak_of_samples(count: int) -> int:
        changed = edited(recipe, [f"train.micro_batch_size={count}"])
        return plan(changed, batch=synthetic_batch(config, changed, tokens)).peak

    def peak_of_tokens(count: int) -> int:
        return plan(recipe, batch=synthetic_batch(config, recipe, count)).peak

    room = int((1 - MARGIN) * card) - residual
    searches = [
        partial(_most, peak_of_samples, recipe.train.micro_batch_size, room, MOST_SAMPLES, 1),
        partial(_most, peak_of_tokens, tokens, room, MOST_TOKENS, 64),
    ]
    samples, longest = side_by_side(searches)
    return {"micro_batch_size": samples, "tokens": longest}


def _most(peak: Callable[[int], int], start: int, room: int, limit: int, unit: int) -> int:
    """The largest multiple of `unit` up to `limit` whose peak is in the room; 0 if there is none.

    Peaks grow nearly in proportion: the line through two of them says where to look.
    """
    tried: dict[int, int] = {}

    def known(count: int) -> int:
        if count not in tried:
            try:
                tried[count] = peak(count)
            except UserError:  # such as too short for a picture
                tried[count] = -1
        return tried[count]

    low, high = start, 2 * start
    slope = max((known(high) - known(low)) / (high - low), 1e-9)
    best = min(limit, int(low + (room - known(low)) / slope)) // unit * unit
    while best > 0 and known(best) > room:
        best -= unit
    return best if best > 0 and known(best) >= 0 else 0
