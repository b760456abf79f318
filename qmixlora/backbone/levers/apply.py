"""Where the frozen weights lie, and in which precision: the levers of a recipe's `model` section, pulled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qmixlora.recipe import Model

from ..anatomy import Anatomy
from ..checks import check_levers
from .quantized_embedding import quantize_embedding
from .quantized_head import quantize_head
from .streaming import Ring, host_like, stream_layers


def has_levers(spec: Model) -> bool:
    """Whether anything is to lie elsewhere, or in another precision, than `quantization` says."""
    quantized = {spec.quantize_lm_head, spec.quantize_embeddings} != {"none"}
    return quantized or spec.offload_embeddings or spec.stream_layers > 0


def without_levers(spec: Model) -> Model:
    """The same model with everything on the device, and nothing quantised but what `quantization` names."""
    here = {"quantize_lm_head": "none", "quantize_embeddings": "none", "offload_embeddings": False, "stream_layers": 0}
    return spec.model_copy(update=here)


def arrange(model: PreTrainedModel, anatomy: Anatomy, spec: Model, device: torch.device) -> None:
    """Pull the recipe's levers, in place; what is left goes to the device, where it is not there yet.

    On the meta device the same happens without storage: what is to lie in host memory is then a CPU tensor that takes
    none.

    Raises:
        UserError: as `check_levers`.
    """
    check_levers(model, anatomy, spec)
    paths = {id(module): name for name, module in model.named_modules()}
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if spec.quantize_lm_head != "none":
        model.set_submodule(paths[id(head)], quantize_head(head, spec.quantize_lm_head, device))
    if spec.quantize_embeddings != "none":
        model.set_submodule(paths[id(embedding)], quantize_embedding(embedding, spec.quantize_embeddings, device))
    elif spec.offload_embeddings:
        keep_on_host(embedding, device)
    if spec.stream_layers:
        stream_layers(model, anatomy, spec.stream_layers, device)
    model.requires_grad_(False)
    model.to(device)


def keep_on_host(embedding: nn.Embedding, device: torch.device) -> None:
    """Have the lookup done in host memory, for whoever calls the module: ids come over, and their rows go back.

    The weight is no parameter any more, so that nobody moves it (`Trainer` does) or takes it for the place where the
    model is. It is not pinned: what is copied are rows that were gathered from it, not the weight.
    """
    weight = host_like(embedding.weight.detach())
    del embedding.weight
    embedding.weight = weight

    def ids_to_host(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(ids.to("cpu") for ids in args)

    def rows_to_device(_: nn.Module, args: Any, rows: Tensor) -> Tensor:
        return rows.to(device)

    embedding.register_forward_pre_hook(ids_to_host)
    embedding.register_forward_hook(rows_to_device)


def host_tensors(model: nn.Module) -> list[Tensor]:
    """What the levers keep in host memory: the offloaded embeddings, and the packed weights of streamed layers."""
    found: list[Tensor] = []
    for module in model.modules():
        held = module.__dict__
        if isinstance(held.get("streaming"), Ring):
            found += [piece for pieces in held["streaming"].hosts for piece in pieces]
        if isinstance(held.get("weight"), Tensor):
            found.append(held["weight"])
    return found
