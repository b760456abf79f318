"""Experts that a model holds as one parameter (E x ...), in NF4: frozen, and dequantised one at a time.

transformers' quantiser for 4 bits takes linear layers alone, and leaves such a parameter in 16 bits.

Shapes: E experts, R x C the matrix of one (out x in, or in x out, as the class has it), T tokens.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.nn.modules import Params4bit
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .nf4 import BLOCK, SCALE_BLOCK, meta_weight

LINEAR, PRODUCTS = nn.functional.linear, (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.bmm)


def expert_parameters(decoder: nn.Module) -> list[str]:
    """The names of a decoder's parameters that hold the matrices of several experts, each of whole blocks."""
    convolutions = {id(p) for m in decoder.modules() if isinstance(m, nn.modules.conv._ConvNd) for p in m.parameters()}
    return [
        name
        for name, parameter in decoder.named_parameters()
        if parameter.dim() == 3
        and id(parameter) not in convolutions
        and len(parameter) > 1
        and min(parameter.shape[1:]) > 1
        and parameter[0].numel() % BLOCK == 0
    ]


class Held:
    """A weight in NF4 that is dequantised for whatever computes with it: of one expert, or (without an index) of all.

    A product with it keeps no dequantised weight for the backward pass, which dequantises it again.
    """

    def __init__(self, experts: NF4Experts, index: int | None) -> None:
        self.experts, self.index = experts, index

    def value(self) -> Tensor:
        """The dequantised weight: R x C, or E x R x C."""
        return self.experts.dequantised(self.index)

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self.value(), other)

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):
            raise AttributeError(name)
        return getattr(self.value(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs and len(args) in (2, 3) and isinstance(args[0], Tensor) and isinstance(args[1], Held):
            if function is LINEAR:
                output = _Product.apply(args[0], args[1], True)
                return output if len(args) == 2 or args[2] is None else output + args[2]
            if function in PRODUCTS:
                return _Product.apply(args[0], args[1], False)
        plain_args, plain_kwargs = tree_map_only(Held, Held.value, (args, kwargs or {}))
        return function(*plain_args, **plain_kwargs)


class _Product(torch.autograd.Function):
    """x W^T (`linear`) or x W, with a weight that is dequantised in both passes."""

    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, weight: Held, linear: bool) -> Tensor:
        ctx.weight, ctx.linear = weight, linear
        value = weight.value().to(x_TC.dtype)
        return torch.matmul(x_TC, value.mT if linear else value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        value = ctx.weight.value().to(gradients[0].dtype)
        return torch.matmul(gradients[0], value if ctx.linear else value.mT), None, None


class NF4Experts(nn.Module):
    """The parameter of experts in NF4 with double quantisation, in the place of the 16-bit one.

    `experts[e]` is the weight of an expert; used as a tensor, it is that of all of them.
    """

    weight: Params4bit

    def __init__(self, weight: Params4bit, shape: torch.Size) -> None:
        super().__init__()
        self.weight, self.shape = weight, shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the dequantised weights."""
        dtype: torch.dtype = self.weight.quant_state.dtype
        return dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | Tensor) -> Held:
        return Held(self, int(index))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(Held(self, None), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*tree_map_only(NF4Experts, lambda experts: Held(experts, None), args), **(kwargs or {}))

    def dequantised(self, index: int | None) -> Tensor:
        """The weight of an expert (R x C), or of all (E x R x C), as bitsandbytes dequantises the whole parameter.

        As one long row: its kernel for the CPU computes wrongly where rows are not whole blocks.
        """
        state = self.weight.quant_state
        shape, packed = self.shape if index is None else self.shape[1:], self.weight.data
        if packed.device.type == "meta":
            return torch.empty(shape, dtype=state.dtype, device="meta")
        size = shape.numel()
        start = 0 if index is None else index * size
        own = bnb.functional.QuantState(
            absmax=_scales(state, start // BLOCK, (start + size) // BLOCK), shape=torch.Size((1, size)),
            dtype=state.dtype, blocksize=BLOCK, code=state.code, quant_type="nf4",
        )  # fmt: skip
        part = packed.view(-1)[start // 2 : (start + size) // 2].view(-1, 1)
        weight: Tensor = bnb.functional.dequantize_4bit(part, own)
        return weight.view(shape)


def _scales(state: bnb.functional.QuantState, first: int, last: int) -> Tensor:
    """The scales of some blocks, in fp32, from those of 8 bits with a scale for every 256 of them."""
    outer = first // SCALE_BLOCK, -(-last // SCALE_BLOCK)
    nested = bnb.functional.QuantState(
        absmax=state.state2.absmax[outer[0] : outer[1]], blocksize=SCALE_BLOCK, code=state.state2.code,
        dtype=torch.float32,
    )  # fmt: skip
    begin = outer[0] * SCALE_BLOCK
    scales: Tensor = bnb.functional.dequantize_blockwise(state.absmax[begin : outer[1] * SCALE_BLOCK], nested)
    own: Tensor = (scales + state.offset)[first - begin : last - begin].contiguous()
    return own


def nf4_experts(parameter: Tensor, device: torch.device) -> NF4Experts:
    """Experts of this parameter (E x R x C), quantised on the device that they will lie on."""
    if device.type == "meta":
        return NF4Experts(meta_weight(parameter), parameter.shape)
    return NF4Experts(quantised_experts(parameter.to(device)), parameter.shape)


def quantised_experts(parameter: Tensor) -> Params4bit:
    """The parameter in NF4, on its device."""
    weight = Params4bit(parameter.contiguous(), requires_grad=False, blocksize=BLOCK, quant_type="nf4")
    return weight.to(parameter.device)  # type: ignore[misc]  # of its overloads, mypy tries the wrong one


def put_experts(model: nn.Module, name: str, experts: NF4Experts) -> None:
    """Put experts in the place of a parameter, by its name."""
    path, _, own = name.rpartition(".")
    module: Any = model.get_submodule(path)
    del module._parameters[own]
    module.add_module(own, experts)
    module._is_hf_initialized = True


def use_own_forward(model: nn.Module) -> None:
    """Have experts computed by their class' own loop over them: transformers' fused ones read the weights of all."""
    if any(isinstance(module, NF4Experts) for module in model.modules()):
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(module, "is_transposed") and hasattr(config, "_experts_implementation"):
                config._experts_implementation = "eager"
