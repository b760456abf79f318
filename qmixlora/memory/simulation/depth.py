"""Depth: the memory of a step with all decoder layers, from steps of two shallow models.

A decoder is a stack of equal layers. The bytes that a step holds in a given phase (before the layers, in the second
one, in the last but one, at the loss, and the same on the way back) are therefore an affine function of their number:
two shallow models give them for any depth, byte for byte. Where layers differ in shape the whole model is simulated.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from .account import Account


def shallow_depths(config: PretrainedConfig, period: int) -> list[int]:
    """Two depths from which the full one follows; the full one alone where that would save nothing.

    `period` is the distance at which layers are treated alike (checkpointing of every n-th).
    """
    full = int(config.get_text_config().num_hidden_layers)
    if getattr(config.get_text_config(), "num_kv_shared_layers", 0):  # the last layers read others' keys
        return [full]
    least = first_layers(config, period) + period
    one = least + (full - least) % period
    return [one, one + period] if one + period < full else [full]


def first_layers(config: PretrainedConfig, period: int) -> int:
    """Count the layers at the beginning that have phases of their own: the ones that get features of the vision
    tower, and one period.
    """
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


def name_phases(layers: Sequence[nn.Module], account: Account, first: int) -> None:
    """Have the account begin a phase where the forward pass enters a layer and where its gradient comes in.

    The `first` layers are counted from the beginning, the last one from the end. The others are "between": their sizes
    grow or fall evenly from the one end to the other, so that the most is at one of the two.
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


def grown(one: int, two: int, *, at: tuple[int, int], depth: int) -> int:
    """A size at `depth` layers, from its values in two models with `at` layers."""
    steps, rest = divmod(depth - at[1], at[1] - at[0])
    assert rest == 0, "shallow depths are whole periods below the full one"
    return two + steps * (two - one)
