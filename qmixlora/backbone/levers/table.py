"""The table of memory levers. Each has its edit of a recipe, the parts of a run that it helps, and whether a run learns
the same with it. Advice, the recovery from out-of-memory, and the documentation read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from qmixlora.recipe import OWN_INPUT, Edit, Recipe

Part = Literal["loading", "features", "training", "evaluation"]  # of a run
SMALL_CHUNK, CHUNK = 32, 128  # tokens whose logits exist at a time
MLP_CHUNKS = (1024, 256)  # tokens in an MLP at a time
LEAST_STREAMED = 3  # layers: fewer would lie in the two buffers that they are copied to


@dataclass(frozen=True)
class Facts:
    """Facts that edits depend on, 0 where not known: the decoder's layers, and the image tokens of a sample."""

    layers: int = 0
    image_tokens: int = 0


@dataclass(frozen=True)
class Lever:
    """One way to take less memory. `edit` is the next step of it from a recipe, None where there is none (left).

    `learns_the_same`: neither what is trained, nor the data, nor a number of the optimiser changes by more than
    rounding, so that a run can go on with it. `moves_to_host`: it is of no use where there is no GPU.
    """

    key: str
    helps: frozenset[Part]
    learns_the_same: bool
    edit: Callable[[Recipe, Facts], Edit | None]
    moves_to_host: bool = False


def _checkpointing(recipe: Recipe, facts: Facts) -> Edit | None:
    spec = recipe.train.checkpointing
    if spec.enabled and spec.every_n_layers == 1:
        return None
    return Edit({"train.checkpointing.enabled": True, "train.checkpointing.every_n_layers": 1})


def _offloaded_activations(recipe: Recipe, facts: Facts) -> Edit | None:
    spec = recipe.train.checkpointing
    can = spec.enabled and spec.every_n_layers == 1 and not spec.offload
    return Edit({"train.checkpointing.offload": True}) if can else None


def _micro_batch(recipe: Recipe, facts: Facts) -> Edit | None:
    """The largest smaller one that divides the present one, accumulated as much more often: the same steps."""
    spec = recipe.train
    size = next((n for n in range(spec.micro_batch_size // 2, 0, -1) if spec.micro_batch_size % n == 0), None)
    if size is None:
        return None
    times = spec.gradient_accumulation * spec.micro_batch_size // size
    return Edit({"train.micro_batch_size": size, "train.gradient_accumulation": times})


def _batch_tokens(recipe: Recipe, facts: Facts) -> Edit | None:
    """Half of the tokens at a time, as long as every sample fits, and as many more times."""
    spec, longest = recipe.train, recipe.data.max_length
    if spec.batch_tokens is None or spec.batch_tokens <= longest:
        return None
    tokens = max(longest, spec.batch_tokens // 2)
    times = -(-spec.gradient_accumulation * spec.batch_tokens // tokens)
    return Edit({"train.batch_tokens": tokens, "train.gradient_accumulation": times})


def _eval_batch(recipe: Recipe, facts: Facts) -> Edit | None:
    size = recipe.train.eval_batch_size
    return Edit({"train.eval_batch_size": size // 2}) if size > 1 else None


def _loss_chunk(recipe: Recipe, facts: Facts) -> Edit | None:
    chunk = recipe.train.loss_chunk
    if chunk is None:
        return Edit({"train.loss_chunk": CHUNK})
    return Edit({"train.loss_chunk": SMALL_CHUNK}) if chunk > SMALL_CHUNK else None


def _offloaded_embeddings(recipe: Recipe, facts: Facts) -> Edit | None:
    model = recipe.model
    can = not model.offload_embeddings and model.quantize_embeddings == "none"
    return Edit({"model.offload_embeddings": True}) if can else None


def _streamed_layers(recipe: Recipe, facts: Facts) -> Edit | None:
    """Half of the layers that are not streamed yet; eight, then twice as many, where their number is not known."""
    spec, streamed = recipe.train.checkpointing, recipe.model.stream_layers
    if recipe.model.quantization != "nf4" or not (spec.enabled and spec.every_n_layers == 1):
        return None
    count = (streamed + facts.layers + 1) // 2 if facts.layers else max(8, 2 * streamed)
    count = max(LEAST_STREAMED, count)
    can = streamed < (facts.layers or 64) and (not facts.layers or count <= facts.layers)
    return Edit({"model.stream_layers": count}) if can else None


def _paged_optimizer(recipe: Recipe, facts: Facts) -> Edit | None:
    return Edit({"train.optimizer": "paged_adamw_8bit"}) if recipe.train.optimizer == "adamw" else None


def _quantized_head(recipe: Recipe, facts: Facts) -> Edit | None:
    return Edit({"model.quantize_lm_head": "nf4"}) if recipe.model.quantize_lm_head == "none" else None


def _quantized_vision(recipe: Recipe, facts: Facts) -> Edit | None:
    can = recipe.model.quantize_vision == "none" and not recipe.train.cache_features
    return Edit({"model.quantize_vision": "int8"}) if can else None


def _smaller_images(recipe: Recipe, facts: Facts) -> Edit | None:
    return Edit({"data.max_image_tokens": facts.image_tokens * 3 // 5}) if facts.image_tokens > 1 else None


def _cached_features(recipe: Recipe, facts: Facts) -> Edit | None:
    can = not recipe.train.cache_features
    return Edit({"adapter.projector": "frozen", "train.cache_features": True}) if can else None


def _mlp_chunk(recipe: Recipe, facts: Facts) -> Edit | None:
    chunk, adapter = recipe.train.mlp_chunk, recipe.adapter
    if adapter.method == "mixlora" and adapter.route_on in OWN_INPUT:
        return None
    size = next((size for size in MLP_CHUNKS if chunk is None or chunk > size), None)
    return None if size is None else Edit({"train.mlp_chunk": size})


def _low_rank_projector(recipe: Recipe, facts: Facts) -> Edit | None:
    return Edit({"adapter.projector": "lora"}) if recipe.adapter.projector == "full" else None


ANY: frozenset[Part] = frozenset(("loading", "features", "training", "evaluation"))
TRAINING: frozenset[Part] = frozenset(("training",))
LEVERS = (  # those that cost the least time first
    Lever("train.checkpointing", TRAINING, True, _checkpointing),
    Lever("train.micro_batch_size", TRAINING, True, _micro_batch),
    Lever("train.eval_batch_size", frozenset(("features", "evaluation")), True, _eval_batch),
    Lever("train.loss_chunk", frozenset(("training", "evaluation")), True, _loss_chunk),
    Lever("model.offload_embeddings", ANY, True, _offloaded_embeddings, moves_to_host=True),
    Lever("train.mlp_chunk", frozenset(("training", "evaluation")), True, _mlp_chunk),
    Lever("train.checkpointing.offload", TRAINING, True, _offloaded_activations, moves_to_host=True),
    Lever("model.stream_layers", ANY, True, _streamed_layers, moves_to_host=True),
    Lever("train.batch_tokens", TRAINING, False, _batch_tokens),
    Lever("train.optimizer", TRAINING, False, _paged_optimizer),
    Lever("adapter.projector", TRAINING, False, _low_rank_projector),
    Lever("model.quantize_lm_head", ANY, False, _quantized_head),
    Lever("model.quantize_vision", ANY, False, _quantized_vision),
    Lever("data.max_image_tokens", frozenset(("features", "training", "evaluation")), False, _smaller_images),
    Lever("train.cache_features", frozenset(("training", "evaluation")), False, _cached_features),
)


def lever_edits(recipe: Recipe, facts: Facts = Facts(), *, part: Part = "training") -> list[tuple[Lever, Edit]]:
    """The levers that can still be pulled and help a part of a run, with their edits, in the order of the table."""
    edits = ((lever, lever.edit(recipe, facts)) for lever in LEVERS if part in lever.helps)
    return [(lever, edit) for lever, edit in edits if edit is not None]


def to_the_end(lever: Lever, recipe: Recipe, facts: Facts = Facts()) -> Edit:
    """All steps of a lever that are left. Raises AssertionError where there is none."""
    steps = Edit({})
    while (step := lever.edit(steps.apply(recipe), facts)) is not None and steps | step != steps:
        steps |= step  # (the facts are of the recipe as it was: an edit that depends on them comes again)
    assert steps.values, f"{lever.key} is pulled already"
    return steps
