"""One training step of a recipe on the meta device, and its memory at any depth of the decoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from qmixlora.adapter import adapter_config
from qmixlora.backbone import Anatomy
from qmixlora.backbone.levers import (
    chunk_mlps,
    enable_checkpointing,
    host_bytes,
    in_place_of_images,
    take_out_vision,
)
from qmixlora.backbone.levers.streaming import ring_of
from qmixlora.mixlora import MixLoraLayer, is_adapter_parameter
from qmixlora.recipe import Recipe
from qmixlora.session import with_fresh_adapter

from .account import Account, Held, Peak
from .batch import Batch
from .depth import (
    Shallow,
    at_depth,
    first_layers,
    left_by_forward,
    name_phases,
    peaks_at_full_depth,
    shallow_model,
    watch_selection,
    without,
)
from .loading import LoadingPeak, loading_peak
from .replay import blocks_in, replaying
from .simulation import on_meta, simulated
from .skeleton import TASKS, meta_backbone, tensors_of
from .work import Work, training_step

PAGED = 100_000  # and parameters of fewer elements have states that are never paged (bitsandbytes)
SMALL = 4096  # parameters of fewer elements keep 32-bit states under an 8-bit optimiser (bitsandbytes)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a step, each growing evenly with the number of decoder layers."""

    # on the card all along
    nf4_weights: int
    kept_out_weights: int
    adapter: int
    routers: int
    projector: int
    gradients: int  # of earlier micro-batches, which wait
    # in host memory
    host_streamed: int
    host_embeddings: int
    host_activations: int
    # after the forward pass: activations for the backward pass, or keys and values for the next token
    activations_saved: int
    # for the optimiser's own step
    gradients_to_come: int
    trainable: int
    states_32_bit: int
    states_8_bit: int
    states_paged: int  # of the 8-bit ones, where they are paged
    # on the card all along, in a run that records its routing: for each task
    routing_sums: int
    # peaks of loading
    loading_card: int
    loading_host: int


@dataclass(frozen=True)
class Step:
    """A simulated step: its sizes; the peak of every phase beyond what is held all along; the allocator's gaps; the
    bytes that a streamed layer leaves the card.
    """

    sizes: Sizes
    peaks: Mapping[str, Peak]
    gaps: int
    streamed_layer: int

    @property
    def peak(self) -> int:
        """The most of any phase."""
        return max(peak.size for peak in self.peaks.values())

    def counted_from_the_first(self, depth: int) -> Step:
        """The step with the number of its last layer in the names of phases, which count it from the end."""
        last = f"layer {depth - 1}"
        return replace(self, peaks={name.replace("layer -1", last): peak for name, peak in self.peaks.items()})


def simulate(recipe: Recipe, config: PretrainedConfig, batch: Batch, work: Work = training_step) -> Step:
    """The step at full depth, from a shallow model where layers repeat (see `depth`); without its optimiser.

    `work` is what is done with the batch.
    """
    period = period_of(recipe)
    first = first_layers(config, period)
    full = int(config.get_text_config().num_hidden_layers)
    streamed = recipe.model.stream_layers
    few = min(streamed, 2)  # as many as there are buffers
    shallow = shallow_model(recipe, config, period, few) if streamed <= full else None  # too many are refused below
    if shallow is None:
        return _step(recipe, config, batch, first, work).counted_from_the_first(full)
    with_few = recipe.model_copy(update={"model": recipe.model.model_copy(update={"stream_layers": few})})
    few_layers = at_depth(config, shallow.depth)
    step = _step(with_few, few_layers, batch, max(first, shallow.leading), work, shallow)
    if streamed > few:
        step = replace(step, sizes=_with_more_streamed(step, few, streamed - few))
    return step.counted_from_the_first(full)


def period_of(recipe: Recipe) -> int:
    """The distance at which the recipe treats layers alike."""
    checkpointing = recipe.train.checkpointing
    return checkpointing.every_n_layers if checkpointing.enabled else 1


def _with_more_streamed(step: Step, few: int, more: int) -> Sizes:
    """The sizes with `more` layers streamed than the `few` of a simulated step."""
    sizes = step.sizes
    on_host = more * sizes.host_streamed // few
    return replace(
        sizes,
        nf4_weights=sizes.nf4_weights - more * step.streamed_layer,
        loading_card=sizes.loading_card - more * step.streamed_layer,
        host_streamed=sizes.host_streamed + on_host,
        loading_host=sizes.loading_host + on_host,
    )


def _step(
    recipe: Recipe, config: PretrainedConfig, batch: Batch, first: int, work: Work, shallow: Shallow | None = None
) -> Step:
    """The step of a model, or of the full one that a shallow model stands for."""
    backbone, anatomy = meta_backbone(config, recipe.model)
    paths = list(anatomy.layers)
    layers = [backbone.get_submodule(path) for path in paths]
    stored = getattr(config, "dtype", None) or getattr(torch, recipe.model.dtype)
    loading = loading_fewer = loading_peak(backbone, anatomy, recipe.model, stored)
    if shallow:
        with without(backbone, paths, shallow.window):
            loading_fewer = loading_peak(backbone, anatomy, recipe.model, stored)
    model = adapted_on_meta(recipe, backbone, anatomy)
    inputs = _with_features(backbone, anatomy, batch.inputs) if recipe.train.cache_features else batch.inputs
    account = Account()
    name_phases(layers, account, first, shallow.window if shallow else None)
    watch_selection(model.base_model, account)
    trainable = [p for p in model.parameters() if p.requires_grad]
    waits = work is training_step and recipe.train.gradient_accumulation > 1
    if waits:  # gradients, for the next micro-batch
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
    waiting = [p.grad for p in trainable if p.grad is not None]
    tensors = [tensor for _, tensor in tensors_of(model)]
    vision = blocks_in(backbone.get_submodule(path) for path in anatomy.vision)
    with simulated([*tensors, *waiting], account) as storages, replaying(vision, storages):
        work(model, recipe, on_meta(inputs), account)
    streamed_layer = _streamed_layer(backbone.get_submodule(anatomy.language))
    sizes = _sizes(model, waits, Held(account.saved, account.offloaded), loading)
    if shallow:
        left = left_by_forward(account)
        held = Held(account.saved - left.live, account.offloaded - left.offloaded)
        with without(backbone, paths, shallow.window):
            sizes = _grown(sizes, _sizes(model, waits, held, loading_fewer), shallow.missing)
    return Step(sizes, peaks_at_full_depth(account, shallow), account.gaps, streamed_layer)


def _with_features(backbone: PreTrainedModel, anatomy: Anatomy, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with features in place of images, and the model without its vision tower."""
    with simulated([], Account()):
        features = take_out_vision(backbone, anatomy, on_meta(inputs))
    return in_place_of_images(inputs, features)


def _grown(sizes: Sizes, fewer: Sizes, missing: int) -> Sizes:
    """The sizes with the layers that `fewer` is without as many times more as they are missing."""
    pairs = {field.name: (getattr(sizes, field.name), getattr(fewer, field.name)) for field in fields(Sizes)}
    return Sizes(**{name: size + missing * (size - less) for name, (size, less) in pairs.items()})


def adapted_on_meta(recipe: Recipe, backbone: PreTrainedModel, anatomy: Anatomy) -> PeftModel:
    """The model that training would have, from its backbone on the meta device."""
    model = with_fresh_adapter(recipe, backbone, adapter_config(recipe.adapter, anatomy, TASKS))
    enable_checkpointing(backbone, anatomy, recipe.train.checkpointing)
    chunk_mlps(backbone, anatomy, recipe.train.mlp_chunk)
    model.train()
    return model


def _sizes(model: PeftModel, waits: bool, left: Held, loading: LoadingPeak) -> Sizes:
    """The sizes of a model; `left` is what the forward pass has left, and gradients wait or not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    on_host, trained = host_bytes(model), sum(p.nbytes for p in trainable)
    gradients = trained if waits else 0
    return Sizes(
        **_weights(model),
        gradients=gradients,
        host_streamed=on_host.streamed,
        host_embeddings=on_host.embeddings,
        host_activations=left.offloaded,
        activations_saved=left.live,
        gradients_to_come=trained - gradients,
        trainable=trained,
        states_32_bit=sum(8 * p.numel() for p in trainable),
        states_8_bit=sum(_eight_bit_states(p.numel()) for p in trainable),
        states_paged=sum(2 * p.numel() for p in trainable if p.numel() >= PAGED),
        routing_sums=_routing_sums(model),
        loading_card=loading.device,
        loading_host=loading.host,
    )


def _routing_sums(model: nn.Module) -> int:
    """Bytes of `RoutingStatistics` for one task: a matrix in fp64 for every adapted layer."""
    layers = (module for module in model.modules() if isinstance(module, MixLoraLayer))
    return sum(8 * config.num_factors**2 for layer in layers for config in layer.mixlora_config.values())


def _weights(model: nn.Module) -> dict[str, int]:
    """Bytes of the weights on the card before the first step, by the names of `Sizes`."""
    parts = dict.fromkeys(("nf4_weights", "kept_out_weights", "adapter", "routers", "projector"), 0)
    seen: set[int] = set()
    for name, tensor in tensors_of(model):
        key = int(tensor.untyped_storage()._cdata)
        if key not in seen and tensor.device.type == "meta":  # tied weights and buffers of streamed layers count once
            seen.add(key)
            parts[_part(name, tensor)] += tensor.untyped_storage().nbytes()
    return parts


def _part(name: str, tensor: Tensor) -> str:
    if ".modules_to_save." in name:
        return "projector"
    if is_adapter_parameter(name):
        return "routers" if re.search("_route_|_center|mixlora_task", name) else "adapter"
    return "nf4_weights" if tensor.dtype == torch.uint8 or name.endswith(".scales") else "kept_out_weights"


def _streamed_layer(decoder: nn.Module) -> int:
    """Bytes that a streamed layer of this decoder leaves the card (see `Ring`)."""
    ring = ring_of(decoder)
    return 0 if ring is None else len(ring.buffers[0])


def _eight_bit_states(numbers: int) -> int:
    """Bytes of two moments in 8 bits, with a scale for every 256 (bitsandbytes keeps 32 bits for small parameters)."""
    return 8 * numbers if numbers < SMALL else 2 * numbers + 8 * -(-numbers // 256)
