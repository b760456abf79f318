"""Activation checkpointing, non-reentrant, with the saved activations on the device or in host memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from qmixlora.recipe import Checkpointing

from ..anatomy import Anatomy
from .host_memory import pinned_or_pageable


def enable_checkpointing(backbone: PreTrainedModel, anatomy: Anatomy, spec: Checkpointing) -> None:
    """Recompute every n-th decoder layer in the backward pass, as the recipe says; the vision tower is left alone.

    `backbone` is the model without PEFT around it.
    """
    if not spec.enabled:
        return
    # one method, renamed between transformers 5.17 and 5.23
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    enable({"use_reentrant": False}, every_n_layers=spec.every_n_layers)
    if spec.offload:
        module: Any
        for module in backbone.get_submodule(anatomy.language).modules():
            if getattr(module, "gradient_checkpointing", False):
                module._gradient_checkpointing_func = _offloaded(module._gradient_checkpointing_func)
    # Only reentrant checkpointing needs inputs with a gradient; with them the frozen vision tower would be
    # differentiated as well, since transformers marks its patch embeddings too.
    backbone.disable_input_require_grads()


def _offloaded(checkpoint: Callable[..., Any]) -> Any:
    """Wrap a checkpointing function so that a layer's input is kept in host memory.

    (transformers 5.23 has this as `offload=True`, and torch has `save_on_cpu`: both pin memory where there is a GPU,
    even for tensors on meta, and fail where no more can be pinned.)
    """

    def run(*args: Any, **kwargs: Any) -> Any:  # as torch.utils.checkpoint.checkpoint
        with saved_tensors_hooks(_to_host, _to_device):
            return checkpoint(*args, **kwargs)

    return run


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """(where the tensor was, its copy in host memory); copied on the stream that computes, as in `save_on_cpu`."""
    if not tensor.is_cuda:
        return tensor.device, tensor.cpu()
    return tensor.device, pinned_or_pageable(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)


def _to_device(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, tensor = packed
    return tensor.to(device, non_blocking=tensor.is_pinned()) if device.type == "cuda" else tensor.to(device)
