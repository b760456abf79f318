"""The probe: two real steps of a recipe on the device at hand, with random weights of the right shapes."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only
from transformers import PretrainedConfig, PreTrainedModel

from qmixlora.adapter import adapter_config
from qmixlora.backbone import Anatomy, make_skeleton, nf4_linear
from qmixlora.backbone.experts import nf4_experts, put_experts, use_own_forward
from qmixlora.backbone.frozen import freeze
from qmixlora.backbone.levers import apply_levers, in_place_of_images, take_out_vision
from qmixlora.backbone.levers.tables import tables_of
from qmixlora.backbone.nf4 import with_bytes
from qmixlora.data import Collator, Conversation
from qmixlora.device import GIB, default_device
from qmixlora.errors import UserError
from qmixlora.memory.architectures import config_of
from qmixlora.memory.cards import CONTEXT
from qmixlora.memory.planner import Plan
from qmixlora.memory.residuals import remember
from qmixlora.memory.simulation.skeleton import TASKS, tensors_of
from qmixlora.out_of_memory import unless_out_of_memory
from qmixlora.recipe import Model, Recipe, edited
from qmixlora.session import TunedSession, with_fresh_adapter

from .callbacks import ProgressDisplay
from .trainer import make_trainer

STEPS = 2


@dataclass(frozen=True)
class CardUse:
    """Bytes that a process took of a card at the peak of some work: of tensors (in the allocator's blocks), reserved by
    the allocator, and all of it, with the context and what other processes have. `retries`: how often the allocator had
    to free its cache first.
    """

    tensors: int
    reserved: int
    process: int
    retries: int


@dataclass(frozen=True)
class Probe:
    """Bytes of tensors at the peak of two real steps, as planned and as measured, on a device by its name.

    On a GPU, what torch's allocator reserved (`torch.cuda.max_memory_reserved`); on a CPU, what it handed out. `built`
    is the same while the random weights were made, on a GPU; `card` everything that was measured there.
    """

    device: str
    model: str
    planned: int
    measured: int
    built: int | None
    card: CardUse | None = None

    @property
    def residual(self) -> int:
        """The bytes that the plan missed; negative where it was above."""
        return self.measured - self.planned

    def to_dict(self) -> dict[str, Any]:
        """The probe in the JSON of `qmixlora plan --probe`, sizes in GiB."""
        built = None if self.built is None else self.built / GIB
        sizes = {"planned_gib": self.planned / GIB, "measured_gib": self.measured / GIB, "built_gib": built}
        card = None if self.card is None else asdict(self.card)  # in bytes
        return {"device": self.device, **sizes, "residual_gib": self.residual / GIB, "card": card}


@dataclass(frozen=True)
class PlannedBatch:
    """In place of a collator, for training alone: the planned batch, whatever the rows. There is no processor."""

    inputs: Mapping[str, Any]

    @classmethod
    def collator(cls, inputs: Mapping[str, Any]) -> Collator:
        """The planned batch as sessions take it."""
        return cast(Collator, cls(inputs))

    def __call__(self, rows: Sequence[Conversation]) -> dict[str, Any]:
        return dict(self.inputs)


def probe(recipe: Recipe, plan: Plan) -> Probe:
    """Two steps of the planned batch through the run's own Trainer. The residual is kept (see `residuals`).

    Raises UserError if the device runs out of memory.
    """
    result = unless_out_of_memory(lambda: _probe(recipe, config_of(recipe.model), plan))
    if result is None:
        raise UserError(
            f"The probe ran out of memory; planned were {plan.peak / GIB:.1f} GiB.",
            where=f"model.id: {recipe.model.id}",
            fix="Apply an edit that the plan advises, or close what else uses the GPU.",
        )
    remember(result.device, result.model, result.residual)
    return result


def _probe(recipe: Recipe, config: PretrainedConfig, plan: Plan) -> Probe:
    device, inputs = default_device(), plan.batch.inputs
    recipe = edited(
        recipe,
        [
            f"train.max_steps={STEPS}", "train.save_every=", "train.eval_every=", "data.validation=",
            f"train.gradient_accumulation={min(2, recipe.train.gradient_accumulation)}", "data.num_workers=0",
            "data.group_by_length=false", "train.batch_tokens=",
        ],
    )  # fmt: skip
    backbone, anatomy = random_backbone(config, recipe.model, device)
    built = int(torch.cuda.max_memory_reserved(device)) if device.type == "cuda" else None
    model = with_fresh_adapter(recipe, backbone, adapter_config(recipe.adapter, anatomy, TASKS))
    session = TunedSession(recipe, model, anatomy, PlannedBatch.collator(inputs))
    if recipe.train.cache_features:
        features = take_out_vision(backbone, anatomy, session.on_device(inputs))
        on_host = tree_map_only(Tensor, Tensor.cpu, features)  # as feature files give them
        session = replace(session, collator=PlannedBatch.collator(in_place_of_images(inputs, on_host)))
    measured = peak_of(lambda: _train(session), model, device)
    if device.type == "cuda":
        name, planned, card = torch.cuda.get_device_name(device), reserved(plan), card_use(device)
    else:
        name, planned, card = "cpu", plan.tensors - plan.parts.routing_sums, None
    return Probe(name, recipe.model.id, planned, measured, built, card)


def reserved(plan: Plan) -> int:
    """The part of a plan that torch's CUDA allocator reserves in a probe: neither the context, nor paged states, which
    bitsandbytes takes from the driver, nor routing sums, which a probe has none of.
    """
    parts = plan.parts
    return plan.peak - CONTEXT - plan.paged - parts.routing_sums - parts.missed


def card_use(device: torch.device) -> CardUse:
    """What this process has taken of a card since the peaks were reset last (see `peak_of`)."""
    stats = torch.cuda.memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    beside = total - free - torch.cuda.memory_reserved(device)
    reserved = torch.cuda.max_memory_reserved(device)
    return CardUse(stats["allocated_bytes.all.peak"], reserved, beside + reserved, stats["num_alloc_retries"])


def random_backbone(config: PretrainedConfig, spec: Model, device: torch.device) -> tuple[PreTrainedModel, Anatomy]:
    """The backbone of `load_backbone`, with random weights. Tensor by tensor: a 16-bit weight is quantised before the
    next one is made, and weights that are to lie in host memory are made there.
    """
    model, anatomy = make_skeleton(config, spec)
    on_host = anatomy.in_first_layers(spec.stream_layers)
    for path in anatomy.in_nf4 if spec.quantization == "nf4" else ():
        linear = cast(nn.Linear, model.get_submodule(path))
        bias = None if linear.bias is None else _random(linear.bias, device)
        layer = nf4_linear(_random(linear.weight, device), bias, device)  # a card quantises much faster than a CPU
        if path in on_host:
            layer.weight = with_bytes(layer.weight, layer.weight.data.cpu())
        model.set_submodule(path, layer)
    for name in anatomy.experts_in_nf4 if spec.quantization == "nf4" else ():
        put_experts(model, name, nf4_experts(_random(model.get_parameter(name), device), device))
    use_own_forward(model)
    on_cpu = {table.lookup for table in tables_of(model, anatomy, spec) if table.on_host}
    for module in model.modules():
        _materialize(module, torch.device("cpu") if module in on_cpu else device)
    model.tie_weights()
    model.initialize_weights()
    apply_levers(model, anatomy, spec, device)
    freeze(model, anatomy)
    return model, anatomy


def peak_of(work: Callable[[], None], model: nn.Module, device: torch.device) -> int:
    """Bytes of tensors at the peak of some work, the model's among them (see `Probe`)."""
    gc.collect()  # garbage of earlier work must not be freed in between
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return int(torch.cuda.max_memory_reserved(device))
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _all_tensors(model)}
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
            work()
    finally:
        gc.enable()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return sum(storages.values()) + peak


def _train(session: TunedSession) -> None:
    rows = datasets.Dataset.from_dict({"row": range(STEPS * 2 * session.recipe.train.micro_batch_size)})
    with tempfile.TemporaryDirectory() as folder:
        display = ProgressDisplay(Console(quiet=True))
        try:
            make_trainer(session, rows, None, Path(folder), display, checks_numbers=False).train()
        finally:
            display.close()


def _materialize(module: nn.Module, device: torch.device) -> None:
    """Give a module's own tensors storage: random weights, and buffers that the model then fills itself (the
    frequencies of rotary embeddings are no weights). transformers initialises modules that are not marked as such.
    """
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.device.type == "meta":
            made = nn.Parameter(_random(parameter, device), requires_grad=False)
            made._is_hf_initialized = True  # type: ignore[attr-defined]
            module.register_parameter(name, made)
    buffers = dict(module.named_buffers(recurse=False))
    for name, buffer in buffers.items():
        module._buffers[name] = torch.zeros_like(buffer, device=device)
    module._is_hf_initialized = not buffers  # type: ignore[assignment]


def _random(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_like(tensor, device=device, requires_grad=False).normal_(std=0.02)


def _all_tensors(model: nn.Module) -> list[Tensor]:
    return [tensor for _, tensor in tensors_of(model)]
