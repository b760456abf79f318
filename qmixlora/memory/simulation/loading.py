"""The peak of loading a backbone, from a model on meta whose levers are applied.

transformers 5.23 with bitsandbytes 0.50: tensors are mapped from their file, not read; each is copied to the device in
16 bits, quantised there, and let go, before the next one is looked at (`convert_and_load_state_dict_in_model`: no
thread pool while quantising; without quantisation, four threads). The block that transformers reserves first
(`caching_allocator_warmup`) is as large as the quantised weights.

Measured on a CPU with a LLaVA of 247 million numbers, anonymous memory beyond what stays: 12 bytes for each weight of
the largest quantised tensor, which is what bitsandbytes' CPU quantiser takes; nothing for what is not quantised, which
stays mapped. On a GPU: not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn
from transformers import PreTrainedModel

from qmixlora.backbone import Anatomy
from qmixlora.backbone.experts import NF4Experts
from qmixlora.backbone.levers import HostEmbedding, has_levers, host_bytes
from qmixlora.backbone.levers.int8_linear import Int8Linear
from qmixlora.backbone.levers.quantized_embedding import ROWS, Int8Table, NF4Table, QuantizedEmbedding
from qmixlora.backbone.levers.quantized_head import PiecewiseLinear
from qmixlora.backbone.levers.streaming import ring_of
from qmixlora.backbone.nf4 import quant_state_of
from qmixlora.recipe import Model

THREADS = 4  # tensors in flight without quantisation (transformers' GLOBAL_WORKERS)
IN_NF4 = (Linear4bit, NF4Experts)
SCALE = 4 / 64  # bytes per weight: fp32 scales of NF4 before they are quantised too


@dataclass(frozen=True)
class LoadingPeak:
    """Bytes of tensors on the device and in host memory, weights that stay there included. Without the CUDA context,
    Python's own memory, and the file's pages, which the system drops when it is short.
    """

    device: int
    host: int


def loading_peak(model: PreTrainedModel, anatomy: Anatomy, spec: Model, stored: torch.dtype) -> LoadingPeak:
    """The peak of `load_backbone`, for a model on meta after `apply_levers`; `stored` is the checkpoint's dtype.

    device = what stays + the largest of the tensors on their way (16 bits, 4 bits and scales of an NF4 weight;
    `quantized_embedding.ROWS` rows of another table), + where nothing is quantised while loading, the 16-bit tensors
    that a lever takes off the device again.

    host = what stays there + the tensors in flight, where they change their dtype + where something lies elsewhere
    than on the device, all that is not NF4 (if it changes its dtype; else it is mapped) and one streamed layer.
    """
    wide = getattr(torch, spec.dtype).itemsize
    placed = spec.quantization == "nf4" and has_levers(spec)
    replaced = _replaced(model, anatomy)
    device = _on_device(model) + max([*_on_their_way(model, wide), 0])
    device += sum(replaced) * wide if spec.quantization == "none" else 0
    host = sum(host_bytes(model)) + (_largest_streamed(model) if placed else 0)
    if stored.itemsize != wide:
        four_bit = [quant_state_of(m).shape.numel() for m in model.modules() if isinstance(m, IN_NF4)]
        sizes = sorted([*_kept_wide(model), *replaced, *four_bit], reverse=True)
        host += wide * sum(sizes[: THREADS if spec.quantization == "none" else 1])
        host += (sum(_kept_wide(model)) + sum(replaced)) * wide if placed else 0
    return LoadingPeak(int(device), int(host))


def _on_device(model: nn.Module) -> int:
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, IN_NF4):
            state = quant_state_of(module)
            tensors += [state.absmax, state.code, state.state2.absmax, state.state2.code]
    return _bytes(tensors)


def _bytes(tensors: list[Tensor]) -> int:
    """Bytes of storages, each counted once. A tensor without storage on the CPU counts as much as it shows."""
    storages: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = tensor.nbytes if tensor.device.type == "cpu" else storage.nbytes()
    return sum(storages.values())


def _on_their_way(model: nn.Module, wide: int) -> list[float]:
    """Bytes on the device of each tensor that is quantised there, while it is."""
    sizes: list[float] = []
    for module in model.modules():
        if isinstance(module, IN_NF4):
            sizes.append(quant_state_of(module).shape.numel() * (wide + 0.5 + SCALE))
        elif isinstance(module, NF4Table):
            rows, width = module.shape
            sizes.append(min(rows, ROWS) * width * (wide + 0.5 + SCALE))
        elif isinstance(module, Int8Table | Int8Linear):
            rows, width = (module.held if isinstance(module, Int8Table) else module.weight).shape
            sizes.append(min(rows, ROWS) * width * (wide + 3 * 4))  # fp32: the rows, their size, and the steps
    return sizes


def _replaced(model: PreTrainedModel, anatomy: Anatomy) -> list[int]:
    """The numbers in each tensor that a lever takes in 16 bits and leaves elsewhere or in less."""
    head, targets = model.get_output_embeddings(), set(anatomy.targets)
    pieces = set(head.modules()) if isinstance(head, PiecewiseLinear) else set()
    of_its_own = any(True for piece in pieces for _ in (*piece.parameters(), *piece.buffers()))  # not tied to a table
    sizes = [head.in_features * head.out_features] if of_its_own else []
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear | Linear4bit) and name not in targets and module not in pieces:
            sizes.append(module.in_features * module.out_features)  # of the vision tower
        elif isinstance(module, QuantizedEmbedding | HostEmbedding):
            sizes.append(module.num_embeddings * module.embedding_dim)
    return sizes


def _kept_wide(model: PreTrainedModel) -> list[int]:
    """Numbers in each tensor that stays in 16 bits."""
    return [p.numel() for p in model.parameters() if p.is_floating_point()]


def _largest_streamed(model: nn.Module) -> int:
    rings = (ring_of(module) for module in model.modules())
    return max((len(ring.buffers[0]) for ring in rings if ring is not None), default=0)
