"""One training step of a recipe on the meta device, and its memory at any depth of the decoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig

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
from qmixlora.session import backbone_of, with_fresh_adapter

from .account import Account, Peak
from .batch import Batch
from .depth import are_alike, at_depth, first_layers, grown, name_phases, shallow_depths
from .loading import LoadingPeak, loading_peak
from .replay import blocks_in, replaying
from .simulation import on_meta, simulated
from .skeleton import meta_backbone, tensors_of
from .work import Work, training_step

PAGED = 100_000  # and parameters of fewer elements have states that are never paged (bitsandbytes)
SMALL = 4096  # parameters of fewer elements keep 32-bit states under an 8-bit optimiser (bitsandbytes)
TASKS = ("plan", "other")  # of an adapter that is only planned


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
    bytes that a streamed layer leaves the card; and whether layers are alike, so that other depths follow from it.
    """

    sizes: Sizes
    peaks: Mapping[str, Peak]
    gaps: int
    streamed_layer: int
    alike: bool

    @property
    def peak(self) -> int:
        """The most of any phase."""
        return max(peak.size for peak in self.peaks.values())

    def counted_from_the_first(self, depth: int) -> Step:
        """The step with the number of its last layer in the names of phases, which count it from the end."""
        last = f"layer {depth - 1}"
        return replace(self, peaks={name.replace("layer -1", last): peak for name, peak in self.peaks.items()})


def simulate(recipe: Recipe, config: PretrainedConfig, batch: Batch, work: Work = training_step) -> Step:
    """The step at full depth, from two shallow models where layers are alike (see `depth`); without its optimiser.

    `work` is what is done with the batch.
    """
    checkpointing = recipe.train.checkpointing
    period = checkpointing.every_n_layers if checkpointing.enabled else 1
    first = first_layers(config, period)
    full = int(config.get_text_config().num_hidden_layers)
    depths = shallow_depths(config, period)
    streamed = recipe.model.stream_layers
    if len(depths) == 1 or streamed > full:  # too many are refused where they are streamed
        return _step(recipe, config, batch, first, work).counted_from_the_first(full)
    few = min(streamed, 2)  # as many as there are buffers
    model = recipe.model.model_copy(update={"stream_layers": few})
    shallow = recipe.model_copy(update={"model": model})
    one, two = (_step(shallow, at_depth(config, depth), batch, first, work) for depth in depths)
    if not two.alike:
        return _step(recipe, config, batch, first, work).counted_from_the_first(full)
    step = _at_full_depth(one, two, (depths[0], depths[1]), full)
    if streamed > few:
        step = replace(step, sizes=_with_more_streamed(step.sizes, two, few, streamed - few))
    return step.counted_from_the_first(full)


def _at_full_depth(one: Step, two: Step, at: tuple[int, int], full: int) -> Step:
    """The step of the whole model, from those of two shallow ones with `at` layers."""
    grow = partial(grown, at=at, depth=full)
    names = [field.name for field in fields(Sizes)]
    sizes = Sizes(**{name: grow(getattr(one.sizes, name), getattr(two.sizes, name)) for name in names})
    peaks = {
        phase: Peak(grow(one.peaks[phase].size, peak.size), peak.operation)
        for phase, peak in two.peaks.items()
        if phase in one.peaks
    }
    return replace(two, sizes=sizes, peaks=peaks, gaps=max(one.gaps, two.gaps))


def _with_more_streamed(sizes: Sizes, step: Step, few: int, more: int) -> Sizes:
    """The sizes with `more` layers streamed than the `few` of a simulated step."""
    on_host = more * step.sizes.host_streamed // few
    return replace(
        sizes,
        nf4_weights=sizes.nf4_weights - more * step.streamed_layer,
        loading_card=sizes.loading_card - more * step.streamed_layer,
        host_streamed=sizes.host_streamed + on_host,
        loading_host=sizes.loading_host + on_host,
    )


def _step(recipe: Recipe, config: PretrainedConfig, batch: Batch, first: int, work: Work) -> Step:
    model, anatomy, loading = make_model(recipe, config)
    backbone, inputs = backbone_of(model), batch.inputs
    if recipe.train.cache_features:
        with simulated([], Account()):
            features = take_out_vision(backbone, anatomy, on_meta(inputs))
        inputs = in_place_of_images(inputs, features)
    account = Account()
    layers = [backbone.get_submodule(path) for path in anatomy.layers]
    name_phases(layers, account, first)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if work is training_step and recipe.train.gradient_accumulation > 1:  # they wait for the next micro-batch
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
    waiting = [p.grad for p in trainable if p.grad is not None]
    tensors = [tensor for _, tensor in tensors_of(model)]
    vision = blocks_in(backbone.get_submodule(path) for path in anatomy.vision)
    with simulated([*tensors, *waiting], account) as storages, replaying(vision, storages):
        work(model, recipe, on_meta(inputs), account)
    return Step(
        sizes=_sizes(model, trainable, waiting, account, loading),
        peaks=account.peaks,
        gaps=account.gaps,
        streamed_layer=_streamed_layer(backbone.get_submodule(anatomy.language)),
        alike=are_alike(layers),
    )


def make_model(recipe: Recipe, config: PretrainedConfig) -> tuple[PeftModel, Anatomy, LoadingPeak]:
    """The model that training would have, on the meta device; and the peak of loading it."""
    backbone, anatomy = meta_backbone(config, recipe.model)
    stored = getattr(config, "dtype", None) or getattr(torch, recipe.model.dtype)
    loading = loading_peak(backbone, anatomy, recipe.model, stored)
    model = with_fresh_adapter(recipe, backbone, adapter_config(recipe.adapter, anatomy, TASKS))
    enable_checkpointing(backbone, anatomy, recipe.train.checkpointing)
    chunk_mlps(backbone, anatomy, recipe.train.mlp_chunk)
    model.train()
    return model, anatomy, loading


def _sizes(
    model: PeftModel, trainable: list[nn.Parameter], waiting: list[Tensor], account: Account, loading: LoadingPeak
) -> Sizes:
    on_host = host_bytes(model)
    gradients, trained = sum(grad.nbytes for grad in waiting), sum(p.nbytes for p in trainable)
    return Sizes(
        **_weights(model),
        gradients=gradients,
        host_streamed=on_host.streamed,
        host_embeddings=on_host.embeddings,
        host_activations=account.offloaded,
        activations_saved=account.saved,
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
