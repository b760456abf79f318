"""Linear layers in NF4 with double quantisation: real ones, and ones on meta, which have shapes and no storage.

Shapes: O out-features, I in-features. A block is 64 weights with one scale; 256 scales have one scale of their own.
"""

from __future__ import annotations

from typing import Any, cast

import bitsandbytes as bnb
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor, nn

BLOCK, SCALE_BLOCK = 64, 256


def nf4_linear(weight_OI: Tensor, bias_O: Tensor | None, device: torch.device) -> Linear4bit:
    """A frozen layer of this weight, quantised on the device that it will lie on.

    It computes in the weight's dtype. bitsandbytes' repacking for the CPU is off (`keep_cpu_weights_unpacked`).
    """
    out_features, in_features = weight_OI.shape
    layer = Linear4bit(
        in_features, out_features, bias=bias_O is not None, compute_dtype=weight_OI.dtype, quant_type="nf4",
        device="meta",
    )  # fmt: skip
    if device.type == "meta":
        layer.weight = meta_weight(weight_OI)
    else:
        # `.to` quantises; a slice of a larger weight must not bring all of it along
        weight = Params4bit(
            weight_OI.contiguous(), requires_grad=False, blocksize=BLOCK, quant_type="nf4", module=layer
        )
        layer.weight = weight.to(device)  # type: ignore[misc]  # of its overloads, mypy tries the wrong one
    layer.quant_state = quant_state_of(layer)
    if bias_O is not None:
        layer.bias = torch.nn.Parameter(bias_O.to(device), requires_grad=False)
    layer.support_avx512bf16_for_cpu = False
    return layer


def quant_state_of(layer: nn.Module) -> bnb.functional.QuantState:
    """The scales of a quantised layer, or of experts; a layer holds them itself where its weight is sharded."""
    state = getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)
    return cast(bnb.functional.QuantState, state)


def meta_weight(weight: Tensor) -> Params4bit:
    """Packed bytes and their scales as bitsandbytes leaves them on a card, without storage."""
    meta: dict[str, Any] = {"device": "meta"}
    count = weight.numel()
    scales = -(-count // BLOCK)
    nested = bnb.functional.QuantState(
        absmax=torch.empty(-(-scales // SCALE_BLOCK), **meta),
        blocksize=SCALE_BLOCK,
        code=torch.empty(256, **meta),
        dtype=torch.float32,
    )
    state = bnb.functional.QuantState(
        absmax=torch.empty(scales, dtype=torch.uint8, **meta),
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=BLOCK,
        code=torch.empty(16, **meta),
        quant_type="nf4",
        offset=torch.empty((), **meta),
        state2=nested,
    )
    packed = torch.empty((-(-count // 2), 1), dtype=torch.uint8, **meta)
    return Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=BLOCK, compress_statistics=True, quant_type="nf4",
        bnb_quantized=True,
    )  # fmt: skip


def with_bytes(weight: Tensor, packed: Tensor) -> Params4bit:
    """The quantised weight with its packed bytes elsewhere; its scales stay where they are."""
    assert isinstance(weight, Params4bit), "only NF4 weights are moved"
    return Params4bit(
        packed,
        requires_grad=False,
        quant_state=weight.quant_state,
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
        bnb_quantized=True,
    )
