"""One training step of a recipe on the meta device, and what it takes at any depth of the decoder."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from qmixlora.backbone import host_tensors
from qmixlora.loss import supervised_loss
from qmixlora.recipe import Recipe
from qmixlora.session import Session, adapter_config, assemble
from qmixlora.training.features import in_place_of_pictures, take_out_vision
from qmixlora.training.run import enable_checkpointing

from .account import Account
from .batch import Batch
from .depth import are_alike, at_depth, extrapolated, first_layers, name_stretches, shallow_depths
from .loading import loading_peak
from .simulation import on_meta, simulate_step, simulated
from .skeleton import meta_backbone, tensors_of

SMALL = 4096  # parameters of fewer elements keep 32-bit states under an 8-bit optimiser (bitsandbytes)
STREAMED = "streamed layers"
GAPS = "allocator's gaps"


@dataclass(frozen=True)
class Step:
    """Bytes of a simulated step: on the card all along (`held`) and on the host, by part; the most in every stretch
    beyond what is held, and the operation there; other sizes by name.
    """

    held: dict[str, int]
    host: dict[str, int]
    sizes: dict[str, int]
    peaks: dict[str, int]
    places: dict[str, str]
    alike: bool = True  # whether other depths follow from this one


def simulate(recipe: Recipe, config: PretrainedConfig, batch: Batch) -> Step:
    """The step at full depth, from two shallow models where layers are alike (see `depth`); without its optimiser."""
    checkpointing = recipe.train.checkpointing
    period = checkpointing.every_n_layers if checkpointing.enabled else 1
    first = first_layers(config, period)
    full = int(config.get_text_config().num_hidden_layers)
    depths = shallow_depths(config, period)
    streamed = recipe.model.stream_layers
    if len(depths) == 1 or streamed > full:  # too many are refused where they are streamed
        return _counted_from_the_first(_step(recipe, config, batch, first), full)
    few = min(streamed, 2)  # as many as there are buffers
    model = recipe.model.model_copy(update={"stream_layers": few})
    shallow = recipe.model_copy(update={"model": model})
    one, two = (_step(shallow, at_depth(config, depth), batch, first) for depth in depths)
    if not two.alike:
        return _counted_from_the_first(_step(recipe, config, batch, first), full)
    grow = partial(extrapolated, at=(depths[0], depths[1]), depth=full)
    held, host, sizes = grow(one.held, two.held), grow(one.host, two.host), grow(one.sizes, two.sizes)
    sizes[GAPS] = max(one.sizes[GAPS], two.sizes[GAPS])
    if streamed > few:
        more = streamed - few
        held["NF4 weights"] -= more * two.sizes["a streamed layer"]
        sizes["loading, card"] -= more * two.sizes["a streamed layer"]
        host[STREAMED] += more * two.host[STREAMED] // few
        sizes["loading, host"] += more * two.host[STREAMED] // few
    return _counted_from_the_first(Step(held, host, sizes, grow(one.peaks, two.peaks), two.places), full)


def _counted_from_the_first(step: Step, depth: int) -> Step:
    """The step with the number of its last layer in the names of stretches, which count it from the end."""
    last = f"layer {depth - 1}"
    peaks = {name.replace("layer -1", last): size for name, size in step.peaks.items()}
    return replace(step, peaks=peaks, places={name.replace("layer -1", last): at for name, at in step.places.items()})


def _step(recipe: Recipe, config: PretrainedConfig, batch: Batch, first: int) -> Step:
    session, loading = _session(recipe, config)
    inputs = batch.inputs
    if recipe.train.cache_features:
        with simulated([], Account()):
            features = take_out_vision(session, on_meta(inputs))
        inputs = in_place_of_pictures(inputs, features)
    account = Account()
    decoder = session.model.get_base_model().get_submodule(session.anatomy.language)
    layers = list(next(child for child in decoder.children() if isinstance(child, nn.ModuleList)))
    name_stretches(layers, account, first)
    trainable = [p for p in session.model.parameters() if p.requires_grad]
    if recipe.train.gradient_accumulation > 1:  # they wait for the next micro-batch
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
    waiting = [p.grad for p in trainable if p.grad is not None]
    held = [tensor for _, tensor in tensors_of(session.model)]
    loss = partial(supervised_loss, session.model, chunk=recipe.train.loss_chunk)
    simulate_step(loss, inputs, [*held, *waiting], account)
    return Step(
        held={
            **_weights(session.model),
            "gradients": sum(grad.nbytes for grad in waiting),
        },
        host={**_on_host(session.model), "activations": account.offloaded},
        sizes={
            "activations saved": account.saved,
            GAPS: account.gaps,
            "gradients to come": sum(p.nbytes for p in trainable) - sum(grad.nbytes for grad in waiting),
            "trainable": sum(p.nbytes for p in trainable),
            "32-bit states": sum(8 * p.numel() for p in trainable),
            "8-bit states": sum(_eight_bit_states(p.numel()) for p in trainable),
            "a streamed layer": _streamed_layer(decoder),
            **loading,
        },
        peaks=account.peaks,
        places=account.places,
        alike=are_alike(layers),
    )


def _session(recipe: Recipe, config: PretrainedConfig) -> tuple[Session, dict[str, int]]:
    """The session that training would open, on the meta device; and the peak of loading it."""
    backbone, anatomy = meta_backbone(config, recipe.model)
    stored = getattr(config, "dtype", None) or getattr(torch, recipe.model.dtype)
    loading = loading_peak(backbone, recipe.model, stored)
    tasks = ["plan", "other"]
    session = assemble(recipe, backbone, None, anatomy, adapter_config(recipe.adapter, anatomy, tasks))
    enable_checkpointing(session)
    session.model.train()
    return session, {"loading, card": loading.device, "loading, host": loading.host}


def _weights(model: nn.Module) -> dict[str, int]:
    """Bytes of what lies on the card before the first step, by part."""
    parts = {"NF4 weights": 0, "kept-out weights": 0, "adapter": 0, "routers": 0, "projector": 0}
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
    if "lora_" in name:  # mixlora_ among them
        return "routers" if re.search("_route_|_center|mixlora_task", name) else "adapter"
    return "NF4 weights" if tensor.dtype == torch.uint8 or name.endswith(".scales") else "kept-out weights"


def _on_host(model: nn.Module) -> dict[str, int]:
    """Bytes of frozen weights in host memory, by part (without storage here: they count as what they show)."""
    tensors = host_tensors(model)
    return {
        STREAMED: sum(t.numel() for t in tensors if t.dtype == torch.uint8),
        "embeddings": sum(t.numel() * t.element_size() for t in tensors if t.dtype != torch.uint8),
    }


def _streamed_layer(decoder: nn.Module) -> int:
    """Bytes that a streamed layer of this decoder leaves the card (see `Ring`)."""
    ring = getattr(decoder, "streaming", None)
    return 0 if ring is None else len(ring.buffers[0])


def _eight_bit_states(numbers: int) -> int:
    """Bytes of two moments in 8 bits, with a scale for every 256 (bitsandbytes keeps 32 bits for small parameters)."""
    return 8 * numbers if numbers < SMALL else 2 * numbers + 8 * -(-numbers // 256)
