"""Frozen parts compute the same in training as in generation: no dropout, no drop path, no batch statistics."""

from __future__ import annotations

from types import MethodType

from torch import nn

from .anatomy import Anatomy


def freeze(model: nn.Module, anatomy: Anatomy) -> None:
    """Freeze a model in place. Its towers and projectors stay in evaluation mode from now on, but for the parts of them
    that are trained later, which follow `train()` as ever.
    """
    model.requires_grad_(False)
    for path in (*anatomy.vision, *anatomy.projectors, *anatomy.others):
        part = model.get_submodule(path)
        part.train = MethodType(_train, part)  # type: ignore[method-assign]  # a copy of the part gets one of its own
        part.eval()


def _train(self: nn.Module, mode: bool = True) -> nn.Module:
    type(self).train(self, False)
    for part in _trained(self) if mode else ():
        type(part).train(part, True)
    return self


def _trained(module: nn.Module) -> list[nn.Module]:
    """The largest parts of a module that are trained whole."""
    parameters = list(module.parameters())
    if parameters and all(parameter.requires_grad for parameter in parameters):
        return [module]
    return [part for child in module.children() for part in _trained(child)]
