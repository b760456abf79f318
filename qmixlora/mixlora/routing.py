"""What the layers must know about the batch in flight: where the routing tokens are, which tasks, prefill or decode.

Shapes: B batch, S sequence, D width of the condition, E = F factors in a pool.

`PeftModel.forward` calls the innermost model and bypasses the tuner, so a `Routing` is made by a forward pre-hook on
that model and stays until the next forward: activation checkpointing recomputes the layers during the backward pass
and must read the same one. Two forward passes before one backward pass would break that, so do not do it.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .selection import mean_over


@dataclass
class Routing:
    """One batch. Masks are None where nothing is known about the positions: then all of them count.

    `conditions`, `task_ids` and `replaced` are kept per adapter: condition_BD for `embedding` and `task` routing, the
    index of each sample's task (-1 unknown), and the samples whose gates `task_mix` replaces. `selected` holds mixes
    that were selected before the first layer; `mixes` what each layer selected, without its graph: decoding reads it
    instead of selecting again. `task_means` and `centers` hold running means as they were before this batch; their
    presence tells that the forward pass at hand is a recomputation. `pooled` is the last input that was averaged.
    `starts_step` is false while gradients of earlier batches wait for the same optimiser step.
    """

    prompt_BS: Tensor | None = None
    instruction_BS: Tensor | None = None
    conditions: dict[str, Tensor] = field(default_factory=dict)
    task_ids: dict[str, Tensor] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    decoding: bool = False
    starts_step: bool = True
    selected: dict[tuple[nn.Module, str], Tensor] = field(default_factory=dict)
    mixes: dict[tuple[nn.Module, str], Tensor] = field(default_factory=dict)
    task_means: dict[tuple[nn.Module, str], Tensor] = field(default_factory=dict)
    centers: dict[nn.Module, Tensor] = field(default_factory=dict)
    pooled: tuple[weakref.ref[Tensor], str, Tensor] | None = None

    def mask(self, route_on: str) -> Tensor | None:
        """The routing tokens (B x S) for a layer that routes on its own input."""
        return {"all": None, "prompt": self.prompt_BS, "instruction": self.instruction_BS}[route_on]

    def mean_input(self, x_BSI: Tensor, route_on: str) -> Tensor:
        """A layer's input averaged over the routing tokens (B x I), computed once for layers that read the same tensor
        one after the other (q, k and v; gate and up). Nothing is kept alive for that.
        """
        if self.pooled is not None:
            last, tokens, mean_BI = self.pooled
            if last() is x_BSI and tokens == route_on:
                return mean_BI
        mean_BI = mean_over(x_BSI, self.mask(route_on))
        self.pooled = (weakref.ref(x_BSI), route_on, mean_BI)
        return mean_BI


class RoutingContext:
    """Shared by a tuner and its layers: the current `Routing`, and the tasks of the `with` block around it."""

    def __init__(self) -> None:
        self.current = Routing()
        self.tasks: Sequence[str] | None = None


@contextmanager
def routed_as(model: nn.Module, tasks: Sequence[str]) -> Iterator[None]:
    """Give the task label of each sample to forward passes in this block (`generate` refuses unknown arguments).

    Does nothing for a model without a MixLoRA adapter.
    """
    context = getattr(model, "mixlora_routing", None)
    if context is None:
        yield
        return
    before, context.tasks = context.tasks, tasks
    try:
        yield
    finally:
        context.tasks = before


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes: where any of its parameters lies but the host, else the host. (Some of its frozen weights
    may be kept in host memory; which parameter comes first says nothing.)
    """
    places = (parameter.device for parameter in model.parameters())
    return next((place for place in places if place.type != "cpu"), torch.device("cpu"))


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Selection is fp32 whoever trains, and however. (The meta device has no autocast to leave.)"""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def image_token_ids(config: Any) -> list[int]:
    """The placeholder tokens that stand for pixels, as far as the model's config names them."""
    name = re.compile(r"(image|video|vision|img)\w*token(_id|_index)$")
    return sorted(
        {value for key, value in getattr(config, "__dict__", {}).items() if name.search(key) and isinstance(value, int)}
    )


def is_decoding(inputs: dict[str, Any]) -> bool:
    """Whether a forward pass continues a sequence whose prompt is already in the key-value cache."""
    cache = inputs.get("past_key_values")
    return cache is not None and int(cache.get_seq_length()) > 0


def routing_masks(
    inputs: dict[str, Any], routing_mask_BS: Tensor | None, image_ids: Sequence[int]
) -> tuple[Tensor | None, Tensor | None]:
    """(prompt_BS, instruction_BS): tokens before the first supervised one, without padding; and the text among them.

    `routing_mask_BS` (the prompt, as the collator knows it) wins over what `attention_mask` and `labels` tell. A
    sample whose prompt has no text is routed on its whole prompt.
    """
    input_ids, prompt_BS = inputs.get("input_ids"), routing_mask_BS
    if prompt_BS is None:
        attention, labels = inputs.get("attention_mask"), inputs.get("labels")
        if isinstance(attention, Tensor) and attention.dim() == 2:
            prompt_BS = attention.bool()
        elif input_ids is not None:
            prompt_BS = torch.ones_like(input_ids, dtype=torch.bool)
        if prompt_BS is not None and labels is not None:
            prompt_BS = prompt_BS & ((labels != -100).cumsum(dim=1) == 0)
    if prompt_BS is None:
        return None, None
    prompt_BS = prompt_BS.bool()
    if input_ids is None or not image_ids:
        return prompt_BS, prompt_BS
    text_BS = prompt_BS & ~torch.isin(input_ids, torch.tensor(image_ids, device=input_ids.device))
    return prompt_BS, torch.where(text_BS.any(dim=1, keepdim=True), text_BS, prompt_BS)
