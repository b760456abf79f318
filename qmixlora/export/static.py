"""A run as an ordinary adapter: one low-rank update per layer, and the projector as it was trained.

Shapes: E = F factors in a pool, I in-features, O out-features, L layers.

Everything that is exported is a `StaticAdapter`: made from what a run learned, put on a backbone as stock PEFT LoRA
(which is measured, polished and saved), or added to a checkpoint's weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor

from qmixlora.adapter import ADAPTER_WEIGHTS
from qmixlora.mixlora import PEFT_PREFIX, MixLoraLayer, StaticLinear
from qmixlora.session import Session, TunedSession, backbone_of, with_adapter

from .low_rank import LowRank, mixed


@dataclass(frozen=True)
class StaticAdapter:
    """`updates` by the layer's path in the model; `modules`: parameters that replace the model's own, by theirs, and go
    along in the adapter; `in_base`: such parameters that a base of the adapter's own has.
    """

    updates: dict[str, LowRank]
    modules: dict[str, Tensor] = field(default_factory=dict)
    in_base: dict[str, Tensor] = field(default_factory=dict)

    def scaled(self, share: float) -> StaticAdapter:
        """A share of every update; whole modules stay."""
        updates = {layer: replace(update, up_OK=share * update.up_OK) for layer, update in self.updates.items()}
        return replace(self, updates=updates)

    def truncated(self, rank: int) -> tuple[StaticAdapter, dict[str, float]]:
        """Every update at a smaller rank, and the share of its squared norm that each layer keeps."""
        cut = {layer: update.truncated(rank) for layer, update in self.updates.items()}
        kept = {layer: share for layer, (_, share) in cut.items()}
        return replace(self, updates={layer: update for layer, (update, _) in cut.items()}), kept


@dataclass(frozen=True)
class Learned:
    """The learned tensors of a run, taken off its model: every layer's pools (E x I, E x O), the updates of layers
    beside the mixture (a projector's), and modules trained whole.

    `merged` are the weights of the layers beside, with their updates; `originals` these and the modules as they were
    before. A plain LoRA is a pool whose mixing matrix is always the identity.
    """

    pools: dict[str, tuple[Tensor, Tensor]]
    beside: dict[str, LowRank]
    scaling: float
    modules: dict[str, Tensor]
    originals: dict[str, Tensor]
    merged: dict[str, Tensor]
    is_mixture: bool

    @property
    def projector(self) -> dict[str, Tensor]:
        """The parameters of the trained projector, which is the same for all tasks."""
        return {**self.modules, **self.merged}

    def adapter(self, mix_LEF: Tensor) -> StaticAdapter:
        """The update under one mixing matrix per layer, such as a task's mean `C_t` or a mixture of several."""
        updates = {
            layer: mixed(*pools, self.scaling, mix_EF)
            for (layer, pools), mix_EF in zip(self.pools.items(), mix_LEF, strict=True)
        }
        return StaticAdapter({**updates, **self.beside}, self.modules)

    def identity(self) -> Tensor:
        """Mixing matrices that leave every factor alone with its partner (L x E x F)."""
        factors = len(next(iter(self.pools.values()))[0])
        return torch.eye(factors).expand(len(self.pools), -1, -1)


def learned_by(model: PeftModel, projector: Collection[str] = ()) -> Learned:
    """Copy the learned tensors of a MixLoRA or LoRA model to the CPU; `projector` are its layers that have factors."""
    name = model.active_adapter
    pools, beside, merged, originals, scaling, is_mixture = {}, {}, {}, {}, 1.0, False
    for path, layer in _tuned_layers(model).items():
        if isinstance(layer, StaticLinear) or path in projector:
            beside[path] = _factors(layer, name)
            weight = originals[f"{path}.weight"] = _copy(layer.get_base_layer().weight)
            merged[f"{path}.weight"] = weight + beside[path].up_OK @ beside[path].down_KI
            continue
        if isinstance(layer, MixLoraLayer):
            pool_EI, pool_EO = layer.mixlora_A[name], layer.mixlora_B[name]
            scaling, is_mixture = layer.mixlora_config[name].scaling, True
        else:
            pool_EI, pool_EO = layer.lora_A[name].weight, layer.lora_B[name].weight.T
            scaling = layer.scaling[name]
        pools[path] = (_copy(pool_EI), _copy(pool_EO))
    modules = {}
    for path, wrapper in _wrappers(model).items():
        before = dict(wrapper.original_module.named_parameters())
        for parameter, value in wrapper.modules_to_save[name].named_parameters():
            modules[f"{path}.{parameter}"] = _copy(value)
            originals[f"{path}.{parameter}"] = _copy(before[parameter])
    return Learned(pools, beside, scaling, modules, originals, merged, is_mixture)


def _factors(layer: Any, name: str) -> LowRank:
    """The update of a layer that is not routed, its scaling folded in."""
    if isinstance(layer, StaticLinear):
        down_KI, up_OK, scaling = layer.mixlora_A[name], layer.mixlora_B[name].T, layer.mixlora_config[name].scaling
    else:
        down_KI, up_OK, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    return LowRank(_copy(down_KI), _copy(scaling * up_OK))


def projector_in_base(adapter: StaticAdapter, learned: Learned) -> StaticAdapter:
    """The adapter on a base that has the trained projector."""
    updates = {layer: update for layer, update in adapter.updates.items() if layer not in learned.beside}
    return StaticAdapter(updates, in_base=learned.projector)


def projector_as_low_rank(
    adapter: StaticAdapter, learned: Learned, rank: int
) -> tuple[StaticAdapter, dict[str, float]]:
    """The change of the trained modules as low-rank updates beside those of the language model.

    Returns the adapter without whole modules, and the share of each parameter's squared change that is kept: the best
    of that rank for matrices, nothing for the rest (biases, norms), which a LoRA has no place for.
    """
    updates, kept = dict(adapter.updates), {}
    for name, value in adapter.modules.items():
        change = value.double() - learned.originals[name].double()
        if value.dim() == 2 and name.endswith(".weight"):
            eye = torch.eye(value.shape[1], dtype=change.dtype)
            wide = LowRank(eye, change) if value.shape[1] <= value.shape[0] else LowRank(change, torch.eye(len(change)))
            updates[name.removesuffix(".weight")], kept[name] = wide.truncated(rank)
        else:
            kept[name] = 1.0 if not change.any() else 0.0
    return StaticAdapter(updates), kept


def lora_session(session: Session, adapter: StaticAdapter, trained: Iterable[str] = ()) -> TunedSession:
    """The session's backbone with the adapter on it as a stock PEFT LoRA, in place of its present adapter.

    Only the low-rank factors of the layers in `trained` are trainable. `r` and `lora_alpha` are those of the language
    model's layers, and patterns say it of others: some servers (llama.cpp) read the one alpha alone.
    """
    ranks = {layer: update.rank for layer, update in adapter.updates.items()}
    rank = max(ranks[layer] for layer in ranks if layer in session.anatomy.targets)
    others = {layer: r for layer, r in ranks.items() if r != rank}
    projectors = [p for p in session.anatomy.projectors if any(name.startswith(f"{p}.") for name in adapter.modules)]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # a scaling of 1, whatever the layer's rank
        lora_dropout=session.recipe.adapter.dropout,
        target_modules=list(adapter.updates),
        rank_pattern=others,
        alpha_pattern=dict(others),
        modules_to_save=projectors or None,
    )
    changes = {"method": "lora", "r": rank, "alpha": float(rank), "task_mix": 0.0}
    made = with_adapter(session, session.recipe.adapter.model_copy(update=changes), config)
    made.model.requires_grad_(False)
    layers = _tuned_layers(made.model)
    for path in trained:
        layers[path].lora_A.requires_grad_(True)
        layers[path].lora_B.requires_grad_(True)
    put(made.model, adapter)
    return made


def put(model: PeftModel, adapter: StaticAdapter) -> None:
    """Write the adapter's values into a LoRA model that `lora_session` made for one of these shapes."""
    name = model.active_adapter
    with torch.no_grad():
        for path, layer in _tuned_layers(model).items():
            layer.lora_A[name].weight.copy_(adapter.updates[path].down_KI)
            layer.lora_B[name].weight.copy_(adapter.updates[path].up_OK)
        for path, wrapper in _wrappers(model).items():
            for parameter, value in wrapper.modules_to_save[name].named_parameters():
                value.copy_(adapter.modules[f"{path}.{parameter}"])
        for module_parameter, whole in adapter.in_base.items():
            backbone_of(model).get_parameter(module_parameter).copy_(whole)


def taken_off(model: PeftModel) -> StaticAdapter:
    """The adapter on a LoRA model, its scaling folded in; layers may differ in rank. What its base has stays there."""
    name = model.active_adapter
    updates = {path: _factors(layer, name) for path, layer in _tuned_layers(model).items()}
    modules = {
        f"{path}.{parameter}": _copy(value)
        for path, wrapper in _wrappers(model).items()
        for parameter, value in wrapper.modules_to_save[name].named_parameters()
    }
    return StaticAdapter(updates, modules)


def read(folder: Path) -> StaticAdapter:
    """The adapter in a folder that was exported as LoRA (its scaling is 1), without what a base of its own has."""
    tensors = {key.removeprefix(PEFT_PREFIX): value for key, value in load_file(folder / ADAPTER_WEIGHTS).items()}
    layers = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    updates = {
        layer: LowRank(tensors.pop(f"{layer}.lora_A.weight"), tensors.pop(f"{layer}.lora_B.weight")) for layer in layers
    }
    return StaticAdapter(updates, tensors)


def _tuned_layers(model: PeftModel) -> dict[str, Any]:
    return {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, MixLoraLayer | StaticLinear | LoraLayer)
    }


def _wrappers(model: PeftModel) -> dict[str, ModulesToSaveWrapper]:
    return {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def _copy(value: Tensor) -> Tensor:
    return value.detach().float().cpu().clone()
