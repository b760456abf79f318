"""Activation checkpointing, non-reentrant, with the saved activations on the device or in host memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from transformers import PreTrainedModel

from qmixlora.recipe import Checkpointing

from ..anatomy import Anatomy


def enable_checkpointing(backbone: PreTrainedModel, anatomy: Anatomy, spec: Checkpointing) -> None:
    """Recompute every n-th decoder layer in the backward pass, as the recipe says; the vision tower is left alone.

    `backbone` is the model without PEFT around it.
    """
    if not spec.enabled:
        return
    backbone.activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False}, every_n_layers=spec.every_n_layers
    )
    if spec.offload:
        module: Any
        for module in backbone.get_submodule(anatomy.language).modules():
            if getattr(module, "gradient_checkpointing", False):
                module._gradient_checkpointing_func = _offloaded(module._gradient_checkpointing_func)
    # Only reentrant checkpointing needs inputs with a gradient; with them the frozen vision tower would be
    # differentiated as well, since transformers marks its patch embeddings too.
    backbone.disable_input_require_grads()


def _offloaded(checkpoint: Callable[..., Any]) -> Any:
    """Wrap a checkpointing function so that a layer's input is kept in host memory, pinned where there is a GPU.

    (transformers 5.23 has this as `offload=True`, and asks for pinned memory even where there is no GPU, which fails.)
    """

    def run(*args: Any, **kwargs: Any) -> Any:  # as torch.utils.checkpoint.checkpoint
        with save_on_cpu(pin_memory=torch.cuda.is_available()):
            return checkpoint(*args, **kwargs)

    return run
