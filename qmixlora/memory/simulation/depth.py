"""How a step's memory grows with the depth of the decoder, so that a few layers tell what all of them take.

A decoder is a stack of equal layers. Everything that a step holds at a given place (before the layers, in the second
one, in the last but one, at the loss, and the same on the way back) is therefore an affine function of their number:
two shallow models give it for any depth, byte for byte. Where layers differ in shape the whole model is simulated.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from .account import Account


def shallow_depths(config: PretrainedConfig, period: int) -> list[int]:
    """Two depths from which the full one follows; the full one alone where that would save nothing.

    `period` is the distance at which layers are treated alike (checkpointing of every n-th).
    """
    full = int(config.get_text_config().num_hidden_layers)
    least = first_layers(config, period) + period
    one = least + (full - least) % period
    return [one, one + period] if one + period < full else [full]


def first_layers(config: PretrainedConfig, period: int) -> int:
    """How many layers at the beginning are told apart: those that get features of the vision tower, and one period."""
    deep = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    return max(period, len(deep) + 1)


def at_depth(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    """The same model with fewer decoder layers, among them one of every kind that the configuration names."""
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    full = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == full:
            kinds = list(dict.fromkeys(value))
            setattr(text, name, [*kinds, *value[len(kinds) :]][:depth])
    text.num_hidden_layers = depth
    return changed


def are_alike(layers: Sequence[nn.Module]) -> bool:
    """Whether decoder layers have the same parameters, by name and shape."""
    shapes = [[(name, parameter.shape) for name, parameter in layer.named_parameters()] for layer in layers]
    return all(shape == shapes[0] for shape in shapes)


def name_stretches(layers: Sequence[nn.Module], account: Account, first: int) -> None:
    """Let the account begin a stretch where the forward pass enters a layer and where its gradient comes in.

    The `first` layers are counted from the beginning, the last one from the end. The others are "between": what they
    take grows or falls evenly from the one end to the other, so that the most is at one of the two.
    """
    count = len(layers)
    for index, layer in enumerate(layers):
        name = f"decoder layer {index}" if index < first else f"decoder layer {index - count}"
        if first <= index < count - 1:
            name = "a decoder layer between"
        layer.register_forward_pre_hook(lambda *_, name=name: account.begin(f"forward, {name}"))
        after = "forward, after the last layer" if index == count - 1 else f"forward, after {name}"
        layer.register_forward_hook(lambda *args, after=after, name=name: _watch(args[2], account, after, name))


def _watch(output: Any, account: Account, after: str, name: str) -> None:
    account.begin(after)
    states = output if isinstance(output, Tensor) else output[0]
    if states.requires_grad:
        states.register_hook(lambda _: account.begin(f"backward, {name}"))


def extrapolated(one: Mapping[str, int], two: Mapping[str, int], at: tuple[int, int], depth: int) -> dict[str, int]:
    """Sizes at `depth` from those of two models with `at` layers; what only one of them has grows with neither."""
    steps, rest = divmod(depth - at[1], at[1] - at[0])
    assert rest == 0
    return {name: two[name] + steps * (two[name] - one[name]) for name in two if name in one}
