"""Will it fit: the peak of a run's training step, where it goes, and what to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from qmixlora.loss import supervised_loss
from qmixlora.recipe import Recipe
from qmixlora.session import Session, adapter_config, assemble
from qmixlora.training import enable_checkpointing

from .account import Account
from .architectures import config_of
from .batch import Batch, synthetic_batch
from .cards import GIB
from .depth import are_alike, at_depth, extrapolated, first_layers, name_stretches, shallow_depths
from .simulation import simulate_step
from .skeleton import meta_backbone, tensors_of

CONTEXT = GIB // 2  # what a CUDA process holds beside its tensors; assumed, not measured
WORKSPACES = 2 * 8.125 * 2**20  # cuBLAS: one of ":4096:2:16:8" KiB for the forward and for the backward thread (torch)
MARGIN = 0.08  # of the card: what a plan leaves free
SMALL = 4096  # parameters of fewer elements keep 32-bit states under an 8-bit optimiser (bitsandbytes)


@dataclass(frozen=True)
class Plan:
    """Bytes at the peak of a training step, by part; `place` is the stretch of the step and the operation there."""

    parts: dict[str, int]
    place: str
    batch: Batch
    card: int | None

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool | None:
        """Whether the peak leaves the margin of the card free; None without a card."""
        return None if self.card is None else self.peak <= (1 - MARGIN) * self.card

    def to_dict(self) -> dict[str, Any]:
        """What `qmixlora plan --json` prints, sizes in GiB."""
        card = None if self.card is None else self.card / GIB
        return {
            "peak_gib": self.peak / GIB,
            "card_gib": card,
            "margin_gib": None if card is None else card - self.peak / GIB,
            "fits": self.fits,
            "parts": {name: size / GIB for name, size in self.parts.items()},
            "place": self.place,
            "tokens": self.batch.tokens,
        }


@dataclass(frozen=True)
class Step:
    """A simulated step: bytes that are there all along by part, the most in every stretch beyond them, and where."""

    held: dict[str, int]
    peaks: dict[str, int]
    places: dict[str, str]
    alike: bool  # whether other depths follow from this one


def plan(recipe: Recipe, *, card: int | None = None, tokens: int | None = None, batch: Batch | None = None) -> Plan:
    """Plan a recipe without weights and without a GPU, by its own training step.

    The batch is `batch`, or one of samples of `tokens` (default `data.max_length`), pictures included. `card` is in
    bytes.

    Raises:
        UserError: the model's configuration cannot be read, its pictures cannot be planned, or do not fit in `tokens`.
    """
    config = config_of(recipe.model)
    batch = batch or synthetic_batch(config, recipe, tokens or recipe.data.max_length)
    step = simulate(recipe, config, batch)
    held = dict(step.held)
    saved, own_step, gaps = (held.pop(name) for name in ("activations saved", "optimizer step", "allocator's gaps"))
    stretch = max(step.peaks, key=lambda name: step.peaks[name])
    beyond, place = step.peaks[stretch], f"{stretch} ({step.places[stretch]})"
    if own_step > beyond:
        beyond, place = own_step, "optimizer step"
    parts = {
        **held,
        "activations saved": min(saved, beyond),
        "gradients and transients": beyond - min(saved, beyond),
        "allocator's gaps": gaps,
        "CUDA context and workspaces (assumed)": int(CONTEXT + WORKSPACES),
    }
    return Plan(parts, place, batch, card)


def simulate(recipe: Recipe, config: PretrainedConfig, batch: Batch) -> Step:
    """The step at full depth, from two shallow models where layers are alike (see `depth`)."""
    checkpointing = recipe.train.checkpointing
    period = checkpointing.every_n_layers if checkpointing.enabled else 1
    full = int(config.get_text_config().num_hidden_layers)
    depths = shallow_depths(config, period)
    steps = [_step(recipe, at_depth(config, depth), batch, first_layers(config, period)) for depth in depths]
    if len(depths) == 1:
        return steps[0]
    if not steps[1].alike:
        return _step(recipe, config, batch, first_layers(config, period))
    (one, two), at = steps, (depths[0], depths[1])
    held = extrapolated(one.held, two.held, at, full)
    held["allocator's gaps"] = max(one.held["allocator's gaps"], two.held["allocator's gaps"])
    return Step(held, extrapolated(one.peaks, two.peaks, at, full), two.places, True)


def _step(recipe: Recipe, config: PretrainedConfig, batch: Batch, first: int) -> Step:
    session = _session(recipe, config)
    account = Account()
    decoder = session.model.get_base_model().get_submodule(session.anatomy.language)
    layers = next(child for child in decoder.children() if isinstance(child, nn.ModuleList))
    name_stretches(layers, account, first)
    trainable = [p for p in session.model.parameters() if p.requires_grad]
    gradients = 0
    if recipe.train.gradient_accumulation > 1:  # they wait for the next micro-batch
        gradients = sum(p.numel() * p.element_size() for p in trainable)
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
    held = [*tensors_of(session.model), *((f"{i}.grad", p.grad) for i, p in enumerate(trainable) if p.grad is not None)]
    loss = partial(supervised_loss, session.model, chunk=recipe.train.loss_chunk)
    simulate_step(loss, batch.inputs, [tensor for _, tensor in held], account)
    own_step = sum(p.numel() * p.element_size() for p in trainable)
    sizes = {
        **_weights(tensors_of(session.model)),
        "gradients": gradients,
        "optimizer": _optimizer(trainable, recipe.train.optimizer),
        "activations saved": account.saved,
        "allocator's gaps": account.gaps,
        # torch's AdamW works on lists of tensors and holds as much again; all gradients are there in any case
        "optimizer step": own_step * (2 if recipe.train.optimizer == "adamw" else 1) - gradients,
    }
    return Step(sizes, account.peaks, account.places, are_alike(layers))


def _session(recipe: Recipe, config: PretrainedConfig) -> Session:
    """The session that training would open, on the meta device."""
    backbone, anatomy = meta_backbone(config, recipe.model)
    tasks = ["plan", "other"]
    session = assemble(recipe, backbone, None, anatomy, adapter_config(recipe.adapter, anatomy, tasks))
    enable_checkpointing(session)
    session.model.train()
    return session


def _weights(held: list[tuple[str, Tensor]]) -> Mapping[str, int]:
    """Bytes of what lies on the card before the first step, by part."""
    parts = {"NF4 weights": 0, "kept-out weights": 0, "adapter": 0, "routers": 0, "projector": 0}
    seen: set[int] = set()
    for name, tensor in held:
        key = int(tensor.untyped_storage()._cdata)
        if key in seen or tensor.device.type != "meta":  # tied weights; what stays on the host
            continue
        seen.add(key)
        parts[_part(name, tensor)] += tensor.untyped_storage().nbytes()
    return parts


def _part(name: str, tensor: Tensor) -> str:
    if ".modules_to_save." in name:
        return "projector"
    if "lora_" in name:  # mixlora_ among them
        return "routers" if "_route_" in name or "_center" in name or "mixlora_task" in name else "adapter"
    return "NF4 weights" if tensor.dtype == torch.uint8 or name.endswith(".scales") else "kept-out weights"


def _optimizer(trainable: list[Tensor], name: str) -> int:
    """Two moments of every trained number: fp32, or 8 bits with a scale for every 256."""
    if name == "adamw":
        return sum(8 * p.numel() for p in trainable)
    return sum(8 * p.numel() if p.numel() < SMALL else 2 * p.numel() + 8 * -(-p.numel() // 256) for p in trainable)
