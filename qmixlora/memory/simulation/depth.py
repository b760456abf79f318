"""Depth: the memory of a step with all decoder layers, from a step of a shallow model.

A decoder is a stack of layers that are equal, or equal at a distance (a hybrid's kinds take turns). In a shallow model
one such period is the window: every layer that is missing does what those in it do, and leaves behind in either pass
what they leave. So the bytes of any phase of the step at full depth follow from its place before, between or after the
two passes through the window, byte for byte; but for what all routers make at once, of which the gates alone are
counted for layers that are missing (0.4 % of phases below the peak, where it was compared). Where layers do not repeat,
the whole model is simulated.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from transformers import PretrainedConfig

from qmixlora.adapter import adapter_config
from qmixlora.backbone import make_skeleton
from qmixlora.errors import UserError
from qmixlora.mixlora import MixLoraModel
from qmixlora.recipe import Recipe

from .account import Account, Held, Peak
from .skeleton import TASKS

BETWEEN = "a decoder layer between"


@dataclass(frozen=True)
class Shallow:
    """A model of `depth` layers in place of one of `full`; the first `leading` ones of either are like no others."""

    depth: int
    full: int
    leading: int
    window: range

    @property
    def missing(self) -> int:
        """How many times the window's layers are missing."""
        return (self.full - self.depth) // len(self.window)


class Parts(NamedTuple):
    """What a model is made of: the kind of each decoder layer (its parameters by name and shape, those that are adapted
    and those that stay in 16 bits), and the numbers in its other parameters.
    """

    layers: tuple[Any, ...]
    others: int


_SHALLOW: dict[Any, Shallow | None] = {}


def shallow_model(recipe: Recipe, config: PretrainedConfig, period: int, streamed: int = 0) -> Shallow | None:
    """The shallowest model that stands for the full one; None where there is none, or it would save nothing. A process
    looks for it once.

    `period` is the distance at which layers are treated alike (checkpointing of every n-th); the first `streamed` ones
    come from host memory.

    Raises UserError as `make_skeleton`.
    """
    adapter = recipe.adapter
    targets = adapter.method, str(adapter.target_modules)
    key = config.to_json_string(), tuple(recipe.model.keep), targets, period, streamed
    if key not in _SHALLOW:
        text = config.get_text_config()
        shares = getattr(text, "num_kv_shared_layers", 0)  # the last layers read others' keys
        _SHALLOW[key] = None if shares else _found(recipe, config, period, streamed)
    return _SHALLOW[key]


def _found(recipe: Recipe, config: PretrainedConfig, period: int, streamed: int) -> Shallow | None:
    parts, listed = _parts(recipe, config), _listed(config.get_text_config())
    full, alike = len(parts.layers), len(set(parts.layers)) == 1
    if full != len(listed) or (streamed and not alike):
        return None
    kinds = list(zip(parts.layers, listed, strict=True))
    models = []
    for leading, distance in {(0, period), _pattern(kinds, period)} if alike else {_pattern(kinds, period)}:
        before = max(first_layers(config, distance), leading, len(set(listed)) - 1, streamed + 1 if streamed else 0)
        depth = before + 2 * distance + (full - before) % distance
        if depth < full:
            # a whole turn before it and one behind it: what the first of a kind does in either pass is not repeated
            models.append(Shallow(depth, full, leading, range(before, before + distance)))
    for model in sorted(models, key=lambda model: model.depth):
        with suppress(UserError):  # such as a layer by its number, which is not there
            if _parts(recipe, at_depth(config, model.depth)) == Parts(parts.layers[: model.depth], parts.others):
                return model
    return None


def _parts(recipe: Recipe, config: PretrainedConfig) -> Parts:
    spec = recipe.model.model_copy(update={"quantization": "none", "attention": "eager"})
    model, anatomy = make_skeleton(copy.deepcopy(config), spec)
    targets = set(adapter_config(recipe.adapter, anatomy, TASKS).target_modules or ())
    layers, outside = [], sum(parameter.numel() for parameter in model.parameters())
    for path, linears in anatomy.layers.items():
        parameters = dict(model.get_submodule(path).named_parameters())
        marked = ([name[len(path) :] for name in linears if name in names] for names in (targets, anatomy.kept))
        layers.append((*((name, p.shape) for name, p in parameters.items()), *map(tuple, marked)))
        outside -= sum(parameter.numel() for parameter in parameters.values())
    return Parts(tuple(layers), outside)


def first_layers(config: PretrainedConfig, period: int) -> int:
    """Count the layers at the beginning that have phases of their own: the ones that get features of the vision
    tower, and one period.
    """
    deep = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    return max(period, len(deep) + 1)


def at_depth(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    """The same model with fewer decoder layers, among them one of every kind that the configuration names: its first
    ones, or one of each kind, the rarest first, before more of the others.
    """
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    for name, values in _by_layer(text).items():
        kinds = sorted(set(values), key=lambda kind: (values.count(kind), values.index(kind)))
        few = values[:depth]
        setattr(text, name, few if set(few) == set(kinds) else [*kinds, *values[len(kinds) :]][:depth])
    text.num_hidden_layers = depth
    return changed


def _by_layer(text: Any) -> dict[str, list[Any]]:
    """The lists of a configuration that have one value for each decoder layer."""
    count = text.num_hidden_layers
    return {name: value for name, value in vars(text).items() if isinstance(value, list) and len(value) == count}


def _listed(text: Any) -> list[tuple[Any, ...]]:
    """The kind of each decoder layer, by all that the configuration lists."""
    lists = list(_by_layer(text).values())
    return [tuple(values[index] for values in lists) for index in range(text.num_hidden_layers)]


def _pattern(kinds: Sequence[Any], period: int) -> tuple[int, int]:
    """How many layers lead, and the distance at which those behind them repeat; a multiple of `period`."""
    count = len(kinds)
    repeating = (
        (leading, distance)
        for distance in range(1, count // 2)
        for leading in range(count // 4)
        if kinds[leading:-distance] == kinds[leading + distance :]
    )
    leading, distance = min(repeating, key=lambda one: one[0] + 2 * one[1], default=(0, count))
    return leading, math.lcm(distance, period)


@contextmanager
def without(model: nn.Module, paths: Sequence[str], window: range) -> Iterator[None]:
    """Take the decoder layers in the window out of a model in this block; `paths` are those of all its layers."""
    stack = cast(nn.ModuleList, model.get_submodule(paths[window.start].rpartition(".")[0]))
    modules = dict(stack._modules)  # deleting changes it
    del stack[window.start : window.stop]
    try:
        yield
    finally:
        stack._modules = modules


def name_phases(layers: Sequence[nn.Module], account: Account, first: int, window: range | None) -> None:
    """Have the account begin a phase where the forward pass enters a layer and where its gradient comes in, and cross
    an edge where either pass enters the window and where it has left it.

    The `first` layers are counted from the beginning, the last one from the end.
    """
    count = len(layers)
    forward = {} if window is None else {window.start: 0, window.stop: 1}
    backward = {} if window is None else {window.stop - 1: 2, window.start - 1: 3}

    def enter(phase: str, edge: int | None) -> None:
        if edge is not None:
            account.cross(edge)
        account.begin(phase)

    def leave(output: Any, name: str, after: str, edge: int | None) -> None:
        account.begin(after)
        states = output if isinstance(output, Tensor) else output[0]
        if states.requires_grad:
            states.register_hook(lambda _: enter(f"backward, {name}", edge))

    for index, layer in enumerate(layers):
        name = f"decoder layer {index}" if index < first else f"decoder layer {index - count}"
        if first <= index < count - 1:
            name = BETWEEN
        after = "forward, after the last layer" if index == count - 1 else f"forward, after {name}"
        entered = partial(enter, f"forward, {name}", forward.get(index))
        left = partial(leave, name=name, after=after, edge=backward.get(index))
        layer.register_forward_pre_hook(lambda *_, entered=entered: entered())
        layer.register_forward_hook(lambda *args, left=left: left(args[2]))


def left_by_forward(account: Account) -> Held:
    """What the forward pass through the window has left behind."""
    before, after = account.edges[:2]
    return Held(after.live - before.live, after.offloaded - before.offloaded)


def watch_selection(tuner: nn.Module, account: Account) -> None:
    """Have the account note what a tuner leaves behind that selects for all layers before the first one."""
    if not isinstance(tuner, MixLoraModel):
        return
    select = tuner.select_ahead

    def selecting(name: str) -> None:
        before = account.live
        select(name)
        account.selected += account.live - before

    tuner.__dict__["select_ahead"] = selecting


def peaks_at_full_depth(account: Account, shallow: Shallow | None) -> dict[str, Peak]:
    """The peak of every phase, in a model or in the full one that a shallow model stands for."""
    missing, more = (shallow.missing, shallow.full / shallow.depth - 1) if shallow else (0, 0.0)
    selected = int(more * account.selected)  # gates stay from before the first layer on
    grown = [selected, selected]  # by the edges that were crossed
    for before, after in zip(account.edges[::2], account.edges[1::2], strict=True):
        grown += [grown[-1] + missing * (after.live - before.live)] * 2
    peaks: dict[str, Peak] = {}
    for (phase, crossed), (size, operation) in account.peaks.items():
        # a layer between stands for others at any place, the sizes of which grow evenly from one edge to the other
        here = Peak(size + (max(grown) if BETWEEN in phase else grown[crossed]), operation)
        peaks[phase] = max(peaks.get(phase, here), here, key=lambda peak: peak.size)
    return dict(sorted(peaks.items(), key=lambda item: BETWEEN in item[0]))  # of equal ones, those that are named
