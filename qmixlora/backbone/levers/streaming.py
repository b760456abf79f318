"""Decoder layers whose 4-bit weights lie in host memory, and are copied into one of two buffers for use.

The weight of every linear layer of a streamed decoder layer is a view of its buffer for good; the buffer holds the
bytes of the layer that is in use. Layers alternate between the two buffers, so that while one computes, the next is
copied. Scales (3 % of the bytes) stay on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..nf4 import quant_state_of, with_bytes
from .host_memory import host_like, pinned_or_pageable

ALIGN = 512  # bytes: where a weight may start in a buffer, as in torch's CUDA allocator
RING = "streaming"  # the attribute of a decoder that holds its ring
LEAST = 2**20  # bytes: the smallest piece of pinned memory, of which torch hands out powers of two only


def stream_layers(model: PreTrainedModel, anatomy: Anatomy, count: int, device: torch.device) -> None:
    """Keep the packed weights of the first `count` decoder layers in host memory.

    They may lie on the host or on the device before. The device gets two buffers, as large as the largest layer; the
    decoder carries the ring (`ring_of`).
    """
    paths = list(anatomy.layers.values())[:count]
    assert len(paths) == count, "check_levers has counted them"
    layers = [[_linear4bit(model.get_submodule(path)) for path in layer if path not in anatomy.wide] for layer in paths]
    ring = Ring(layers, device)
    for index, layer in enumerate(layers):
        for module in layer:
            ring.watch(module, index)
    model.get_submodule(anatomy.language).__dict__[RING] = ring


def _linear4bit(module: nn.Module) -> Linear4bit:
    assert isinstance(module, Linear4bit), "only 4-bit layers are streamed"
    return module


def ring_of(module: nn.Module) -> Ring | None:
    """The ring that a decoder carries, if its layers are streamed."""
    ring = module.__dict__.get(RING)
    return ring if isinstance(ring, Ring) else None


class Ring:
    """The host's copies of some layers, and the buffers on the device that hold two of them at a time.

    Not a module: `model.to()` must neither move the copies nor the buffers.
    """

    def __init__(self, layers: list[list[Linear4bit]], device: torch.device) -> None:
        sizes = [sum(_aligned(module.weight.numel()) for module in layer) for layer in layers]
        byte: dict[str, Any] = {"dtype": torch.uint8, "device": device}
        self.buffers = [torch.zeros(max(sizes), **byte) for _ in layers[:2]]
        self.copies = Copies(device)
        self.hosts: list[list[Tensor]] = []
        self.held: list[int | None] = [None] * len(self.buffers)  # the layer in a buffer, or on its way there
        self.last: int | None = None
        for index, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
            buffer, start = self.buffers[index % 2], 0
            for module in layer:
                view = buffer[start : start + module.weight.numel()].view(module.weight.shape)
                if device.type != "meta":
                    view.copy_(module.weight.data)
                quant_state_of(module).to(device)
                module.weight = with_bytes(module.weight, view)
                start += _aligned(view.numel())
            self.hosts.append(_to_host(buffer[:size]))

    def watch(self, module: nn.Module, layer: int) -> None:
        """Have the layer's bytes in place whenever this linear layer of it computes.

        A layer's first linear one asks in the forward pass and in its recomputation. The backward pass asks for itself:
        bitsandbytes keeps the packed weight as a plain attribute, so that its backward pass unpacks nothing, and may
        come before whatever makes checkpointing compute the layer again.
        """

        def before(_: nn.Module, args: Any) -> None:
            self.need(layer)

        def after(_: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda grad: self.need(layer))

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def need(self, layer: int) -> None:
        """Have a layer's bytes in its buffer before the device computes its next kernel, and start copying the
        neighbour that is needed next, in the direction of the pass.
        """
        self._bring(layer)
        self.copies.wait(layer % 2)
        if layer == self.last:
            return
        forward = layer == 0 or (layer != len(self.hosts) - 1 and self.last is not None and layer > self.last)
        self.last = layer
        # the kernels that read the other buffer have been launched: all of a layer's inputs come from the one before
        # it, and all of its outputs' gradients from the one after it
        neighbour = layer + (1 if forward else -1)
        if 0 <= neighbour < len(self.hosts):
            self._bring(neighbour)

    def _bring(self, layer: int) -> None:
        if self.held[layer % 2] != layer:
            self.held[layer % 2] = layer
            self.copies.start(self.buffers[layer % 2], self.hosts[layer], layer % 2)


class Copies:
    """Copies into the buffers: on a CUDA device on a stream of their own, beside its computing; else at once."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.done: dict[int, torch.cuda.Event] = {}

    def start(self, buffer: Tensor, host: list[Tensor], key: int) -> None:
        """Copy the host's pieces to the start of a buffer, after all that was launched before."""
        if self.stream is None:
            _fill(buffer, host)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            _fill(buffer, host)
        self.done[key] = self.stream.record_event()

    def wait(self, key: int) -> None:
        """Have kernels that are launched from now on wait for the last copy under this key."""
        if self.stream is not None and (event := self.done.pop(key, None)) is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(event)


def _fill(buffer: Tensor, host: list[Tensor]) -> None:
    start = 0
    for piece in host:
        stop = min(start + len(piece), len(buffer))
        buffer[start:stop].copy_(piece[: stop - start], non_blocking=True)
        start = stop


def _to_host(buffer: Tensor) -> list[Tensor]:
    """A copy of the bytes in host memory, in pieces whose sizes are powers of two: pinned where the buffer is on a GPU;
    without storage where it is on meta.
    """
    pieces, start = [], 0
    for size in _powers_of_two(len(buffer)):
        if buffer.device.type == "meta":
            pieces.append(host_like(torch.empty(size, dtype=torch.uint8, device="meta")))
        else:
            byte = torch.uint8
            piece = pinned_or_pageable([size], byte) if buffer.is_cuda else torch.empty(size, dtype=byte)
            source = buffer[start : start + size]
            piece[: len(source)].copy_(source)
            pieces.append(piece)
        start += size
    return pieces


def _powers_of_two(size: int) -> list[int]:
    """The fewest powers of two that hold so many bytes, the last one filled up to `LEAST`."""
    pieces = []
    while size > 0:
        piece = max(LEAST, 1 << (size.bit_length() - 1))
        pieces.append(piece)
        size -= piece
    return pieces


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
