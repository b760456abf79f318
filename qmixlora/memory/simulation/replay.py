"""Frozen blocks that are alike: one is simulated, and what it took and gave back is replayed for the others.

A vision tower has dozens of equal blocks, and every edit of a recipe is planned with the same tower. What is replayed
are the events of the account, in their order, so that peaks and the allocator's gaps are those of the simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PretrainedConfig

from .account import Event
from .simulation import LiveStorages, Made, key_of, value_of

PLAIN = int | float | bool | str | None | torch.dtype
NUMBERING = ("layer_idx",)  # attributes that differ between blocks that are alike


@dataclass(frozen=True)
class _Recorded:
    """What a block did: events by numbers of storages, and its output, whose tensors have these numbers."""

    events: tuple[Event, ...]
    storages: tuple[int, ...]  # of the output's tensors
    output: Any


_RECORDED: dict[Any, _Recorded] = {}


@contextmanager
def replaying(blocks: Iterable[nn.Module], storages: LiveStorages) -> Iterator[None]:
    """Have these modules' forward passes be replayed in this block, where they are frozen and one that is alike was
    simulated before (in this process, with the same inputs but for their contents).
    """
    replaced = list(blocks)
    for block in replaced:
        block.__dict__["forward"] = _replayed(block, block.forward, storages)
    try:
        yield
    finally:
        for block in replaced:
            del block.__dict__["forward"]


def blocks_in(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The members of the lists in some modules; of lists inside lists, those of the outer ones."""
    blocks: list[nn.Module] = []
    for module in modules:
        if isinstance(module, nn.ModuleList):
            blocks += module
        else:
            blocks += blocks_in(module.children())
    return blocks


def _replayed(block: nn.Module, forward: Callable[..., Any], storages: LiveStorages) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        key = _identity(block, args, kwargs)
        if key is None:
            return forward(*args, **kwargs)
        if key in _RECORDED:
            return _replay(_RECORDED[key], storages)
        with storages.account.watched() as events:
            output = forward(*args, **kwargs)
        recorded = _record(events, output)
        if recorded is not None:
            _RECORDED[key] = recorded
        return output

    return run


def _identity(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a block's events depend on; None where it is not frozen, or they depend on more than can be told."""
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    if any(tensor.requires_grad for tensor in (*tensors, *block.parameters())):
        return None
    try:
        given = tuple(_told(leaf) for leaf in tree_leaves((args, dict(kwargs))))
    except LookupError:
        return None
    held = tuple((parameter.shape, parameter.dtype) for parameter in block.parameters())
    return tuple(_kind(module) for module in block.modules()), held, tuple(kwargs), given


def _kind(module: nn.Module) -> Any:
    """A module's class and its plain attributes."""
    plain = tuple((n, v) for n, v in vars(module).items() if isinstance(v, PLAIN) and n not in NUMBERING)
    configs = (value for value in vars(module).values() if isinstance(value, PretrainedConfig))
    return type(module), plain, tuple(config._attn_implementation for config in configs)


def _told(leaf: Any) -> Any:
    """An input without its contents, with them where they are known. Raises LookupError where it cannot be told."""
    if isinstance(leaf, Tensor):
        value = value_of(leaf)
        return Made.of(leaf), None if value is None else value.flatten().view(torch.uint8).numpy().tobytes()
    if not isinstance(leaf, PLAIN):
        raise LookupError
    return leaf


def _record(events: list[Event], output: Any) -> _Recorded | None:
    """None where more than the output is left of what the block took, or its output is (of) an input."""
    numbers: dict[int, int] = {}  # of the storages that are alive: addresses are used again
    told = []
    for count, (key, size, operation) in enumerate(events):
        if size is not None:
            numbers[key] = count
        elif key not in numbers:
            return None
        number = numbers.pop(key) if size is None else numbers[key]
        told.append(Event(number, size, operation))
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    keys = [key_of(tensor) for tensor in tensors]
    if (
        set(numbers) != set(keys)
        or len(set(keys)) != len(keys)
        or any(value_of(tensor) is not None for tensor in tensors)
    ):
        return None
    return _Recorded(tuple(told), tuple(numbers[key] for key in keys), tree_map_only(Tensor, Made.of, output))


def _replay(recorded: _Recorded, storages: LiveStorages) -> Any:
    with _disable_current_modes():
        output = tree_map_only(Made, Made.again, recorded.output)
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    keys = {number: key_of(tensor) for number, tensor in zip(recorded.storages, tensors, strict=True)}
    for number, size, operation in recorded.events:
        key = keys.get(number, -1 - number)  # keys of storages are addresses, never negative
        if size is None:
            storages.account.give_back(key)
        else:
            storages.account.take(key, size, operation)
    for tensor in tensors:
        storages.let_go_with(tensor)
    return output
