"""A training step on tensors without storage, with an account of the bytes that would be alive.

Every operation of the real step (the same model, loss, checkpointing and backward pass) goes through a dispatch mode,
which adds up the storages that exist. Small tensors that are computed from known numbers (positions, masks, sizes) keep
their values on the side, so that what depends on them is what it will be.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from qmixlora.backbone.levers.host_memory import host_like

from .account import Account

VALUED = 2**25  # elements up to which tensors of integers keep their values
VALUED_FLOATS = 2**20  # and those of floating-point numbers: sizes are computed from them, activations are not
VALUE = "planned_value"  # the attribute of a tensor on meta that holds it
aten = torch.ops.aten
ASSUMED = {aten.ne.Scalar: True, aten.eq.Scalar: False}  # an unknown number is not the one it is compared with


@dataclass(frozen=True)
class Made:
    """A tensor that an operation made."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: Tensor) -> Made:
        return Made(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    def again(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


_MADE: dict[Any, Any] = {}  # by operation and shapes: the kernels on meta are slow, and layers repeat them


class LiveStorages(TorchDispatchMode):
    """Enters the storages of meta tensors into an account while it is on. `held` are tensors that were there before."""

    def __init__(self, held: Iterable[Tensor], account: Account | None = None) -> None:
        super().__init__()
        self.account = Account() if account is None else account
        self.alive: dict[int, Any] = {key_of(tensor): None for tensor in held}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's guard against it is slow

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [*_tensors(args), *_tensors(kwargs.values())]
        if _to_host(func, kwargs) and _is_activation(args[0]):  # checkpointing keeps it in host memory
            self.account.offloaded += args[0].nbytes
            return host_like(args[0])
        for_python = func is aten._local_scalar_dense.default or _to_host(func, kwargs)
        if for_python or not inputs or any(_has_value(tensor) for tensor in inputs):
            return self._with_values(func, args, kwargs)
        return self._without_values(func, args, kwargs)

    def _without_values(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The usual case. What an operation makes of the same shapes is remembered: kernels on meta are slow."""
        if _aliases(func):
            return func(*args, **kwargs)
        key = (func, *_signature(args), *kwargs, *_signature(kwargs.values()))
        if (made := _MADE.get(key)) is not None:
            out = made.again() if isinstance(made, Made) else tree_map_only(Made, Made.again, made)
        else:
            out = func(*args, **kwargs)
            given = {key_of(tensor) for tensor in _tensors((*args, *kwargs.values()))}
            if not any(key_of(tensor) in given for tensor in _tensors((out,))):
                _MADE[key] = tree_map_only(Tensor, Made.of, out)
        for tensor in _tensors((out,)):
            self._enter(tensor, func)
        if func in ASSUMED:
            setattr(out, VALUE, torch.full(out.shape, ASSUMED[func]))
        return out

    def _with_values(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if func is aten._local_scalar_dense.default:
            return _value(args[0]).item()
        if func is aten.copy_.default and args[0].device.type == "cpu":  # what a model counts on the host
            return func(args[0], _value(args[1]), *args[2:])
        inputs = [*_tensors(args), *_tensors(kwargs.values())]
        if inputs and kwargs.get("device") is None and all(tensor.device.type == "cpu" for tensor in inputs):
            return func(*args, **kwargs)  # on the host alone
        known = self._compute(func, args, kwargs)
        if _to_host(func, kwargs):
            return _value(args[0]) if known is None else known  # as tolist() asks for it
        if func is aten.index.Tensor:
            out: Any = func(args[0], _as_positions(args[1]))
        elif torch.Tag.dynamic_output_shape in func.tags and known is not None:  # nonzero, repeat_interleave, unique
            out = tree_map_only(Tensor, lambda value: torch.empty_like(value, device="meta"), known)
        else:
            out = func(*args, **kwargs)
        values = tree_leaves(known)
        for index, tensor in enumerate(tree_leaves(out)):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self._enter(tensor, func)
                if index < len(values) and isinstance(values[index], Tensor) and _keeps(values[index]):
                    setattr(tensor, VALUE, values[index])
        return out

    def _compute(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """The operation on values, where all its inputs have some and are small; else None."""
        if func is aten.zeros.default and math.prod(args[0]) > VALUED_FLOATS:
            return None  # a gradient's beginning: it would be filled, and not kept
        leaves = tree_leaves((args, dict(kwargs)))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if func.namespace != "aten" or not all(_has_value(tensor) and _keeps(tensor) for tensor in inputs):
            return None
        if not inputs and any(isinstance(leaf, int) and leaf > VALUED for leaf in leaves):
            return None
        plain_args, plain_kwargs = tree_map_only(Tensor, _value, (args, dict(kwargs)))
        if plain_kwargs.get("device") is not None:
            plain_kwargs["device"] = torch.device("cpu")
        with _disable_current_modes():
            return func(*plain_args, **plain_kwargs)

    def _enter(self, tensor: Tensor, func: Any) -> None:
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        key = int(storage._cdata)
        if key not in self.alive:
            self.account.take(key, storage.nbytes(), func)
            self.let_go_with(tensor)

    def let_go_with(self, tensor: Tensor) -> None:
        """Strike the tensor's storage out of the account when it is gone."""
        key = key_of(tensor)
        self.alive[key] = weakref.ref(tensor.untyped_storage(), partial(self._leave, key))

    def _leave(self, key: int, _: Any) -> None:
        del self.alive[key]
        self.account.give_back(key)


@contextmanager
def _functions_of_a_card() -> Iterator[None]:
    """Replace two of torch's functions for a block. (Function modes are not on in the recomputation of checkpointing,
    and cost as much as everything else.)

    Dropout is one kernel on a card, which keeps a mask of one byte per number; elsewhere torch composes it, and keeps a
    mask in the input's dtype. `torch.tensor([...], device="meta")` drops its numbers before a dispatch mode sees them.
    """

    def fused_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p > 0 else input

    def literal(data: Any, **options: Any) -> Tensor:
        if torch.device(options.get("device") or "cpu").type != "meta":
            return tensor(data, **options)
        numbers = tree_map_only(Tensor, Tensor.tolist, data)
        return tensor(numbers, **{**options, "device": "cpu"}).to("meta")

    dropout, tensor = functional.dropout, torch.tensor
    functional.dropout, torch.tensor = fused_dropout, literal  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.dropout, torch.tensor = dropout, tensor


@contextmanager
def simulated(held: Iterable[Tensor], account: Account) -> Iterator[LiveStorages]:
    """Enter into the account every storage that is made on the meta device in this block, beyond those in `held`."""
    with LiveStorages(held, account) as storages, _functions_of_a_card():
        yield storages


def on_meta(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without storage; inside the mode, it is entered, and its index tensors keep their values.

    Segments stay on the host, as in training.
    """

    def move(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor) if tensor.device.type == "meta" else tensor.to("meta")

    moved: dict[str, Any] = tree_map_only(Tensor, move, dict(inputs))
    return {name: inputs[name] if name == "segments" else value for name, value in moved.items()}


def key_of(tensor: Tensor) -> int:
    """The storage's address, by which it is entered."""
    return int(tensor.untyped_storage()._cdata)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors in arguments and results of an operation, which may stand in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (part for part in value if isinstance(part, Tensor))


def _signature(values: Iterable[Any]) -> Iterator[Any]:
    """The inputs that an operation's result depends on, hashable: shapes of tensors, and everything else as it is, with
    its type (2 and 2.0 are equal, and make results of other dtypes).
    """
    for value in values:
        if isinstance(value, Tensor):
            yield (value.shape, value.stride(), value.dtype, value.device.type)
        elif isinstance(value, list | tuple):
            yield tuple(_signature(value))
        else:
            yield (type(value), value)


@cache
def _aliases(func: Any) -> bool:
    """Whether an operation says that it returns or changes what it was given (some do without saying it)."""
    schema = func._schema
    return schema.is_mutable or any(out.alias_info is not None for out in schema.returns)


def _to_host(func: Any, kwargs: Mapping[str, Any]) -> bool:
    return func is aten._to_copy.default and torch.device(kwargs.get("device") or "meta").type == "cpu"


def _is_activation(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() >= 3 and not _has_value(tensor)


def _has_value(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" or hasattr(tensor, VALUE)


def _keeps(tensor: Tensor) -> bool:
    return tensor.numel() <= (VALUED_FLOATS if tensor.is_floating_point() else VALUED)


def value_of(tensor: Tensor) -> Tensor | None:
    """The numbers in a tensor, where they are known."""
    value: Tensor | None = tensor if tensor.device.type != "meta" else getattr(tensor, VALUE, None)
    return value


def _value(tensor: Tensor) -> Tensor:
    value = value_of(tensor)
    if value is None:
        raise RuntimeError("The step asks for a number that depends on weights or pixels; it cannot be planned.")
    return value


def _as_positions(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Boolean masks as positions without storage, as many as are true."""
    positions: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            positions.append(index)
        else:
            count = int(_value(index).sum())
            positions += [torch.empty(count, dtype=torch.long, device="meta")] * index.dim()
    return positions
