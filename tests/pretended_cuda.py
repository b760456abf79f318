"""A CUDA device that is pretended on the CPU, and a count of what would make the host wait for it.

A tensor lies on the pretended card if its storage is marked. Python is told so (`device`, `is_cuda`); operations pass
the mark on, in the forward pass, in what checkpointing computes again and inside autograd. Tensors that do not lie on
one device raise, as on a card.

The host waits where it needs a value (`item`, a shape that depends on values) and where it copies without
`non_blocking`. A copy to the card with `non_blocking` counts as none: it comes from pinned memory (of which a CPU can
tell nothing), or the driver stages it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
HOST = torch.device("cpu")
MARK = "pretended_cuda"
aten = torch.ops.aten

SHAPED_BY_VALUES = {
    aten._local_scalar_dense.default: "value",
    aten.equal.default: "value",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.masked_scatter_backward.default: "masked_select",
    aten._unique2.default: "unique",
    aten.bincount.default: "bincount",
}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
FROM_LISTS = {torch.tensor, torch.as_tensor, Tensor.new_tensor}
TO_PYTHON = {Tensor.tolist, Tensor.numpy}
BETWEEN_DEVICES = {Tensor.copy_, Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_}


class Wait(NamedTuple):
    """What the host waited for, in which phase, and the line that asked for it (`module:line`)."""

    phase: str
    what: str
    line: str

    @property
    def is_ours(self) -> bool:
        return self.line.startswith("qmixlora.")


def on_card(tensor: Tensor) -> bool:
    while torch._C._functorch.is_batchedtensor(tensor):  # of vmap, which has no storage
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return getattr(tensor.untyped_storage(), MARK, False)


def put(tensors: Iterable[Tensor]) -> None:
    """Let tensors lie on the pretended card."""
    for tensor in tensors:
        setattr(tensor.untyped_storage(), MARK, True)


def put_model(model: nn.Module) -> None:
    """Let all that a model holds lie on the pretended card, the scales of 4-bit weights included."""
    put([*model.parameters(), *model.buffers()])
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            nested = [] if state.state2 is None else [state.state2.absmax, state.state2.code]
            put([tensor for tensor in (state.absmax, state.code, state.offset, *nested) if tensor is not None])


class PretendedCuda:
    """The waits of a block (`with cuda.pretended():`), by the `phase` that was set last."""

    def __init__(self) -> None:
        self.waits: Counter[Wait] = Counter()
        self.phase = "start"

    @contextmanager
    def pretended(self) -> Iterator[None]:
        with _Operations(self), _Devices(self):
            yield

    def wait(self, what: str) -> None:
        self.waits[Wait(self.phase, what, _asked_at())] += 1

    def count(self, phase: str | None = None) -> int:
        """The waits of a phase; of all without one."""
        return sum(count for wait, count in self.waits.items() if phase in (None, wait.phase))

    def table(self) -> str:
        """One line for each kind of wait, for messages of failed assertions."""
        return "\n".join(f"{count:3} {' | '.join(wait)}" for wait, count in sorted(self.waits.items()))


class _Operations(TorchDispatchMode):
    """Passes marks on from inputs to outputs, and sees operations that need a value on the host."""

    def __init__(self, cuda: PretendedCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(on_card(tensor) for tensor in _tensors((args, kwargs))):
            return func(*args, **kwargs)
        if func in SHAPED_BY_VALUES:
            self.cuda.wait(SHAPED_BY_VALUES[func])
        elif func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self.cuda.wait("repeat_interleave")
        elif func in INDEXED and any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1])):
            self.cuda.wait("mask as an index")
        elif func in INDEXED and not all(on_card(index) for index in _tensors(args[1])):
            self.cuda.wait("copy of an index to the card")
        out = func(*args, **kwargs)
        put(_tensors(out))
        return out


class _Devices(TorchFunctionMode):
    """Tells Python where tensors lie, moves them, and sees copies that wait."""

    def __init__(self, cuda: PretendedCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.backward:  # what checkpointing computes again is pretended too
            with self:
                return torch.autograd.backward(args[0])
        if (prop := getattr(func, "__self__", None)) is not None and func.__name__ == "__get__":
            told = {Tensor.device: CUDA, Tensor.is_cuda: True, Tensor.is_cpu: False}
            return told[prop] if prop in told and on_card(args[0]) else func(*args, **kwargs)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, args, kwargs)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            return self._made(func, args, kwargs)
        self._check(func, args, kwargs)
        return func(*args, **kwargs)

    def _moved(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        tensor, *where = args
        copy, non_blocking, dtype = kwargs.pop("copy", False), kwargs.get("non_blocking", False), None
        device: torch.device | None = HOST if func is Tensor.cpu else CUDA
        if func is Tensor.to and where and isinstance(where[0], Tensor):
            device, dtype = (CUDA if on_card(where[0]) else HOST), where[0].dtype
        elif func is Tensor.to:
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*where, **kwargs)
        to_card = on_card(tensor) if device is None else device.type == "cuda"
        crosses = to_card != on_card(tensor)
        if crosses and not (to_card and non_blocking):
            self.cuda.wait("copy to the card" if to_card else "copy to the host")
        out: Tensor = tensor.to(dtype=dtype or tensor.dtype, copy=copy or crosses)
        if out is not tensor:
            setattr(out.untyped_storage(), MARK, to_card)
        return out

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in FROM_LISTS:
            self.cuda.wait("copy to the card")
        out = func(*args, **{**kwargs, "device": HOST})
        put(_tensors(out))
        return out

    def _check(self, func: Any, args: Any, kwargs: Any) -> None:
        tensors = _tensors((args, kwargs))
        places = {on_card(tensor) for tensor in tensors if tensor.dim()}
        if func in TO_PYTHON and on_card(args[0]):
            self.cuda.wait("value")
        if len(places) < 2:
            return
        if func not in BETWEEN_DEVICES or (func is not Tensor.copy_ and not on_card(args[0])):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
        if func is Tensor.copy_ and not (on_card(args[0]) and kwargs.get("non_blocking")):
            self.cuda.wait("copy between devices")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _asked_at() -> str:
    """The innermost line outside of torch and this file, by its module's name."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] not in ("torch", "contextlib") and module != __name__:
            return f"{module}:{frame.f_lineno}"
        frame = frame.f_back
    raise AssertionError("somebody asked")
