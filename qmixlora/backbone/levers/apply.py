"""The levers of a recipe's `model` section, applied: where frozen weights lie, and in which precision."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qmixlora.recipe import Model

from ..anatomy import Anatomy
from .checks import check_levers
from .host_embedding import HostEmbedding
from .quantized_embedding import quantize_embedding
from .quantized_head import quantize_head, tied_head
from .quantized_vision import VisionError, quantize_vision
from .streaming import ring_of, stream_layers
from .tables import tables_of


def has_levers(spec: Model) -> bool:
    """Whether weights are to lie elsewhere, or in another precision, than `quantization` alone says."""
    return has_quantized_parts(spec) or spec.offload_embeddings or spec.stream_layers > 0


def has_quantized_parts(spec: Model) -> bool:
    """Whether weights beside the decoder's layers are to be held in 8 or 4 bits."""
    return {spec.quantize_lm_head, spec.quantize_embeddings, spec.quantize_vision} != {"none"}


def without_levers(spec: Model) -> Model:
    """The same model with everything on the device, and only `quantization` left in force."""
    wide = {"quantize_lm_head": "none", "quantize_embeddings": "none", "quantize_vision": "none"}
    return spec.model_copy(update={**wide, "offload_embeddings": False, "stream_layers": 0})


def apply_levers(model: PreTrainedModel, anatomy: Anatomy, spec: Model, device: torch.device) -> VisionError | None:
    """Apply the recipe's levers, in place; the rest of the model goes to the device, where it is not there yet.
    Return what `quantize_vision` did to the tower's weights, where it was pulled.

    On the meta device the same happens without storage: a tensor that is to lie in host memory is then a CPU tensor
    that takes none.

    Raises:
        UserError: as `check_levers`.
    """
    check_levers(model, anatomy, spec)
    _place_tables(model, anatomy, spec, device)
    error = None
    if spec.quantize_vision != "none":
        error = quantize_vision(model, anatomy, spec.quantize_vision, device)
    if spec.stream_layers:
        stream_layers(model, anatomy, spec.stream_layers, device)
    model.requires_grad_(False)
    model.to(device)  # type: ignore[arg-type]  # transformers' wrapper has lost its types
    return error


def _place_tables(model: PreTrainedModel, anatomy: Anatomy, spec: Model, device: torch.device) -> None:
    """Put the embeddings and lm_head where the recipe wants them, in the precision that it wants."""
    tables = tables_of(model, anatomy, spec)
    head: Any = model.get_output_embeddings()
    path_of_head = next((name for name, module in model.named_modules() if module is head), "")
    if spec.quantize_lm_head != "none" and not any(table.is_head for table in tables):
        model.set_submodule(path_of_head, quantize_head(head, spec.quantize_lm_head, device))
    for table in tables:
        if table.on_host:
            model.set_submodule(table.path, HostEmbedding(table.lookup, device))
        elif table.precision != "none":
            quantized = quantize_embedding(table.lookup, table.precision, device)
            model.set_submodule(table.path, quantized)
            if table.is_head:
                model.set_submodule(path_of_head, tied_head(quantized.table))


def host_tensors(model: nn.Module) -> list[Tensor]:
    """The tensors that levers keep in host memory: the embeddings, and the packed weights of streamed layers."""
    tensors: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, HostEmbedding):
            tensors.append(module.weight)
        if (ring := ring_of(module)) is not None:
            tensors += [piece for pieces in ring.hosts for piece in pieces]
    return tensors


class HostBytes(NamedTuple):
    """Bytes of weights in host memory; on the meta device, as many as there would be."""

    embeddings: int
    streamed: int


def host_bytes(model: nn.Module) -> HostBytes:
    """Add up the weights that levers keep in host memory."""
    streamed = sum(tensor.nbytes for tensor in host_tensors(model) if tensor.dtype == torch.uint8)
    return HostBytes(sum(tensor.nbytes for tensor in host_tensors(model)) - streamed, streamed)
