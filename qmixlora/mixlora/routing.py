"""The routing of the batch in flight: its routing tokens, its tasks, prefill or decoding, and its selections.

Shapes: B batch, S sequence, D width of the condition, E = F factors in a pool.

`PeftModel.forward` calls the innermost model and bypasses the tuner, so a `Routing` is made by a forward pre-hook on
that model and stays until the next forward: activation checkpointing recomputes the layers during the backward pass
and must read the same one. Two forward passes before one backward pass would break that, so do not do it.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .selection import mean_over

IGNORED = -100  # the label of every token that is not supervised
Key = tuple[nn.Module, str]  # a layer, and the name of one of its adapters


@dataclass
class RoutingCache:
    """Results of a batch that later forward passes over it read: its recomputation, and its decoding steps.

    `conditions` holds condition_BD of adapters whose condition is known before the first layer, `selected` the mixing
    matrices that were selected there. `mixing_matrices` holds the selection of every layer, without its graph: decoding
    reads it instead of selecting again. `task_means` and `centers` hold running means as they were before the batch;
    their presence tells that the forward pass at hand is a recomputation. `pooled` is the last input that was averaged.
    """

    conditions: dict[str, Tensor] = field(default_factory=dict)
    selected: dict[Key, Tensor] = field(default_factory=dict)
    mixing_matrices: dict[Key, Tensor] = field(default_factory=dict)
    task_means: dict[Key, Tensor] = field(default_factory=dict)
    centers: dict[nn.Module, Tensor] = field(default_factory=dict)
    pooled: tuple[weakref.ref[Tensor], str, Tensor] | None = None


@dataclass(frozen=True)
class Routing:
    """The facts of one batch, and its cache. Masks are None where nothing is known about the positions: then all of
    them count.

    `task_ids` (the index of each sample's task, -1 unknown) and `replaced` (the samples whose gates `task_mix`
    replaces) are kept per adapter. `starts_step` is false while gradients of earlier batches wait for the same
    optimiser step. `decoding`: the batch goes on from a key-value cache, one token at a time.
    """

    prompt_BS: Tensor | None = None
    instruction_BS: Tensor | None = None
    task_ids: Mapping[str, Tensor] = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    starts_step: bool = True
    decoding: bool = False
    cache: RoutingCache = field(default_factory=RoutingCache)

    def mask(self, route_on: str) -> Tensor | None:
        """The routing tokens (B x S) for a layer that routes on its own input."""
        return {"all": None, "prompt": self.prompt_BS, "instruction": self.instruction_BS}[route_on]

    def mean_input(self, x_BSI: Tensor, route_on: str) -> Tensor:
        """Average a layer's input over the routing tokens (B x I), once for layers that read the same tensor one after
        the other (q, k and v; gate and up). Nothing is kept alive for that.
        """
        if self.cache.pooled is not None:
            last, tokens, mean_BI = self.cache.pooled
            if last() is x_BSI and tokens == route_on:
                return mean_BI
        mean_BI = mean_over(x_BSI, self.mask(route_on))
        self.cache.pooled = (weakref.ref(x_BSI), route_on, mean_BI)
        return mean_BI


class RoutingContext:
    """Shared by a tuner and its layers: the current `Routing`, and the tasks of the `with` block around it."""

    def __init__(self) -> None:
        self.current = Routing()
        self.tasks: Sequence[str] | None = None


class OptimizerSteps:
    """Guesses whether the optimiser has stepped since the last batch, which nobody tells a forward pass.

    It looks at one trained tensor and assumes that a step clears its gradient, or (`zero_grad(set_to_none=False)`)
    changes its values in place. It fails where that is not so: where gradients are cleared between the micro-batches
    of a step, or where no gradient reaches the tensor, every batch counts as a step of its own. A centre then moves
    after every micro-batch instead of once per step; nothing else depends on it.
    """

    def __init__(self) -> None:
        self._version = -1

    def have_gone_on(self, parameter: nn.Parameter | None) -> bool:
        """Whether the batch that begins is the first of a step, going by this trained tensor (None: nothing learns)."""
        if parameter is None:
            return True
        before, self._version = self._version, parameter._version
        return parameter.grad is None or parameter._version != before


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
    """The device that a model computes on: that of any parameter on a card; else the host; meta if all are there.

    (Some frozen weights may be kept in host memory, or on meta until accelerate fetches them from the host or the disk:
    the place of the first parameter says nothing.)
    """
    devices = {parameter.device.type: parameter.device for parameter in model.parameters()}
    card = next((device for kind, device in devices.items() if kind not in ("cpu", "meta")), None)
    return card or devices.get("cpu") or devices.get("meta") or torch.device("cpu")


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter or buffer of a PEFT model belongs to a MixLoRA or LoRA adapter, by its name."""
    return "lora_" in name  # mixlora_ among them


def to_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Numbers as a tensor on a device. (`torch.tensor(numbers, device=...)` waits for all that a card has to do.)"""
    return torch.tensor(numbers).to(device, non_blocking=True)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Leave autocast for a block: selection is fp32 whoever trains, and however. (The meta device has none.)"""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def image_token_ids(config: Any) -> list[int]:
    """The ids of placeholder tokens that stand for pixels, as far as the model's config names them."""
    name = re.compile(r"(image|video|vision|img)\w*token(_id|_index)$")
    return sorted(
        {value for key, value in getattr(config, "__dict__", {}).items() if name.search(key) and isinstance(value, int)}
    )


def is_decoding(inputs: dict[str, Any]) -> bool:
    """Whether a forward pass continues a sequence whose prompt is already in the key-value cache."""
    cache = inputs.get("past_key_values")
    return cache is not None and int(cache.get_seq_length()) > 0


def prompt_mask(labels_BS: Tensor, attention_BS: Tensor) -> Tensor:
    """The tokens before the first supervised one, without padding (B x S)."""
    return ((labels_BS != IGNORED).cumsum(dim=1) == 0) & attention_BS.bool()


def routing_masks(
    inputs: dict[str, Any], routing_mask_BS: Tensor | None, image_ids: Sequence[int]
) -> tuple[Tensor | None, Tensor | None]:
    """(prompt_BS, instruction_BS): tokens before the first supervised one, without padding; and the text among them.

    `routing_mask_BS` (the prompt, as the collator knows it) overrules `attention_mask` and `labels`. A sample whose
    prompt has no text is routed on its whole prompt.
    """
    input_ids, prompt_BS = inputs.get("input_ids"), routing_mask_BS
    if prompt_BS is None:
        attention, labels = inputs.get("attention_mask"), inputs.get("labels")
        if isinstance(attention, Tensor) and attention.dim() == 2:
            prompt_BS = attention.bool()
        elif input_ids is not None:
            prompt_BS = torch.ones_like(input_ids, dtype=torch.bool)
        if prompt_BS is not None and labels is not None:
            prompt_BS = prompt_mask(labels, prompt_BS)
    if prompt_BS is None:
        return None, None
    prompt_BS = prompt_BS.bool()
    if input_ids is None or not image_ids:
        return prompt_BS, prompt_BS
    text_BS = prompt_BS
    for image_id in image_ids:
        text_BS = text_BS & (input_ids != image_id)
    return prompt_BS, torch.where(text_BS.any(dim=1, keepdim=True), text_BS, prompt_BS)
