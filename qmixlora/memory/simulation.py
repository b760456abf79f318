"""A training step on tensors without storage, with an account of what would be alive.

Every operation of the real step (the same model, loss, checkpointing and backward pass) goes through a dispatch mode,
which adds up the storages that exist. Index tensors keep their values on the side, so that masks and positions, on
which shapes depend, are what they will be.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

ROUND = 512  # bytes: the granularity of torch's CUDA allocator
VALUED = 2**22  # elements up to which index tensors keep their values
aten = torch.ops.aten


@dataclass(frozen=True)
class Peak:
    """The most that was alive beyond what was there before (bytes), and the operation that reached it."""

    bytes: int
    operation: str


class LiveStorages(TorchDispatchMode):
    """Counts the storages of meta tensors while it is on. `held` are tensors that were there before."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.held = {_key(tensor) for tensor in held}
        self.sizes: dict[int, int] = {}
        self.live = 0
        self.peak = Peak(0, "")
        self.values = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._value(args[0]).item()
        known = self._compute(func, args, kwargs)
        if func is aten._to_copy.default and torch.device(kwargs.get("device") or "meta").type == "cpu":
            return self._value(args[0]) if known is None else known  # as tolist() asks for it
        if func is aten.index.Tensor:
            out: Any = func(args[0], self._as_positions(args[1]))
        elif torch.Tag.dynamic_output_shape in func.tags and known is not None:  # nonzero, repeat_interleave, unique
            out = tree_map_only(Tensor, lambda value: torch.empty_like(value, device="meta"), known)
        else:
            out = func(*args, **kwargs)
        values = tree_leaves(known)
        for index, tensor in enumerate(tree_leaves(out)):
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                self._count(tensor, str(func))
                if index < len(values) and isinstance(values[index], Tensor):
                    self.values[tensor] = values[index]
        return out

    def _value(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta":
            return tensor
        if tensor not in self.values:
            raise RuntimeError("The step asks for a number that depends on weights or pixels; it cannot be planned.")
        value: Tensor = self.values[tensor]
        return value

    def _compute(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """The operation on values, where all its inputs have some and are no floating-point data; else None."""
        inputs = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
        if any(tensor.device.type == "meta" and tensor not in self.values for tensor in inputs):
            return None
        if any(tensor.numel() > VALUED for tensor in inputs) or func.namespace != "aten":
            return None
        made_of_sizes = tree_leaves((args, dict(kwargs)))
        if not inputs and any(isinstance(leaf, int) and leaf > VALUED for leaf in made_of_sizes):
            return None
        plain_args, plain_kwargs = tree_map_only(Tensor, self._value, (args, dict(kwargs)))
        if plain_kwargs.get("device") is not None:
            plain_kwargs["device"] = torch.device("cpu")
        with _disable_current_modes():
            return func(*plain_args, **plain_kwargs)

    def _as_positions(self, indices: Iterable[Tensor | None]) -> list[Tensor | None]:
        """Boolean masks as positions without storage, as many as are true."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype != torch.bool:
                found.append(index)
            else:
                count = int(self._value(index).sum())
                found += [torch.empty(count, dtype=torch.long, device="meta")] * index.dim()
        return found

    def _count(self, tensor: Tensor, operation: str) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self.held or key in self.sizes:
            return
        size = -(-storage.nbytes() // ROUND) * ROUND
        self.sizes[key] = size
        self.live += size
        weakref.finalize(storage, self._free, key)
        if self.live > self.peak.bytes:
            self.peak = Peak(self.live, operation)

    def _free(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)


class _LiteralsKeepValues(TorchFunctionMode):
    """`torch.tensor([...], device="meta")` drops its numbers before any dispatch mode sees them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "meta":
            numbers = tree_map_only(Tensor, Tensor.tolist, args)
            return func(*numbers, **{**kwargs, "device": "cpu"}).to("meta")
        return func(*args, **kwargs)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def on_meta(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without storage; inside the mode, its index tensors keep their values."""
    return {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in inputs.items()}


def simulate_step(
    loss: Callable[[dict[str, Any]], Tensor], inputs: Mapping[str, Any], held: Iterable[Tensor]
) -> tuple[int, Peak]:
    """(bytes saved for the backward pass, peak) of one forward and backward pass, beyond the tensors in `held`.

    Gradients of trainable parameters are part of the peak. `loss` is told the batch on the meta device.
    """
    with LiveStorages(held) as storages:
        with _LiteralsKeepValues():
            value = loss(on_meta(inputs))
        saved = storages.live
        value.backward()
    return saved, storages.peak
