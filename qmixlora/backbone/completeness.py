"""Whether every weight of a model came from its checkpoint: transformers leaves those that did not at random."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from bitsandbytes.nn.modules import Linear4bit
from torch import nn

from qmixlora.errors import UserError, some

from .anatomy import Anatomy, within
from .experts import NF4Experts
from .nf4 import quant_state_of

SHOWN = 3  # names of each kind


def check_complete(model: nn.Module, anatomy: Anatomy, report: Mapping[str, Any], where: str) -> None:
    """Refuse a model some of whose weights were not in its checkpoint, or had another shape there; warn of those that
    the model does not know, and of missing ones in parts that reading images does without (`Anatomy.others`).

    `model` is as it was loaded, with `report` (`output_loading_info` of `from_pretrained`, which takes out tied weights
    and those that a class says may be missing).

    Raises:
        UserError: weights that are used are missing, or have another shape.
    """
    missing = [name for name in report["missing_keys"] if not within(name, anatomy.others)]
    unused = [name for name in report["missing_keys"] if name not in missing]
    unknown = report["unexpected_keys"]
    shapes = {name: (there, here) for name, there, here in report["mismatched_keys"]} | _of_other_layers(model)
    if missing:
        others = f" The checkpoint has others, which the model does not know: {_some(unknown)}." if unknown else ""
        raise UserError(
            f"The checkpoint lacks {_counted(missing)} of the model, which would be random: {_some(missing)}.{others}",
            where=f"model.id: {where}",
            fix="Take the whole checkpoint, with every file that model.safetensors.index.json names; weights under the "
            "names that transformers' save_pretrained gives them; and the config.json that belongs to them.",
        )
    if shapes:
        told = [
            f"{name} is {_by(there)} in it and {_by(here)} by config.json" for name, (there, here) in shapes.items()
        ]
        raise UserError(
            f"The checkpoint has {_counted(shapes)} of other shapes than the model: {_some(told)}.",
            where=f"model.id: {where}",
            fix="Take the config.json that belongs to the weights.",
        )
    if unused:
        warnings.warn(f"The checkpoint lacks {_counted(unused)} that no image needs: {_some(unused)}.", stacklevel=3)
    parts = (anatomy.language, *anatomy.vision, *anatomy.projectors)
    if unknown := [name for name in unknown if within(name, parts)]:
        warnings.warn(
            f"The checkpoint has {_counted(unknown)} that the model does not know and leaves out: {_some(unknown)}. "
            f"Is this the config.json that belongs to it? (model.id: {where})",
            stacklevel=3,
        )


def _of_other_layers(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The weights with another shape than their layer's: while it quantises, transformers compares none of those that
    it quantises (5.17: none at all).
    """
    pairs = {name: _shapes(module) for name, module in model.named_modules()}
    return {name: pair for name, pair in pairs.items() if pair is not None and tuple(pair[0]) != tuple(pair[1])}


def _shapes(module: nn.Module) -> tuple[Any, Any] | None:
    """(the shape of a layer's weight, of a quantised one as it was before; that which its config asks for)."""
    if isinstance(module, Linear4bit | NF4Experts):
        state = quant_state_of(module)
        here = module.shape if isinstance(module, NF4Experts) else (module.out_features, module.in_features)
        return None if state is None else (state.shape, here)
    if type(module) is nn.Linear:
        return module.weight.shape, (module.out_features, module.in_features)
    if type(module) is nn.Embedding:
        return module.weight.shape, (module.num_embeddings, module.embedding_dim)
    return None


def _counted(names: Collection[str]) -> str:
    return f"{len(names)} weight{'s' if len(names) > 1 else ''}"


def _some(names: Collection[str]) -> str:
    return some(sorted(names), SHOWN)


def _by(shape: Any) -> str:
    return " x ".join(map(str, shape))
