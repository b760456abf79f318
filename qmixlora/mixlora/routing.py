"""The routing of the batch in flight: its routing tokens, segments and tasks, prefill or decoding, and its selections.

Shapes: B batch, S sequence, N instances (B, where no sample has several segments), D width of the condition, E = F
factors in a pool.

`PeftModel.forward` calls the innermost model and bypasses the tuner, so a `Routing` is made by a forward pre-hook on
that model and stays until the next forward: activation checkpointing recomputes the layers during the backward pass
and must read the same one. Two forward passes before one backward pass would break that, so do not do it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .given import Given
from .segments import Segments, Tasks
from .selection import mean_over
from .siblings import Projections

CONTEXT = "mixlora_context"  # a layer's attribute
Key = tuple[nn.Module, str]  # a layer, and the name of one of its adapters


@dataclass
class RoutingCache:
    """Results of a batch that later forward passes over it read: its recomputation, and its decoding steps.

    `conditions` holds condition_ND of adapters whose condition is known before the first layer, `selected` the mixing
    matrices selected there, `weights` what layers multiply with (see `weights_of`) where nothing changes that any more.
    `mixing_matrices` holds every layer's selection without its graph, which decoding reads. `task_means` and `centers`
    hold running means as before the batch: their presence tells a recomputation. `pooled` is the input averaged last.
    """

    conditions: dict[str, Tensor] = field(default_factory=dict)
    selected: dict[Key, Tensor] = field(default_factory=dict)
    mixing_matrices: dict[Key, Tensor] = field(default_factory=dict)
    task_means: dict[Key, Tensor] = field(default_factory=dict)
    centers: dict[nn.Module, Tensor] = field(default_factory=dict)
    pooled: tuple[weakref.ref[Tensor], str, Tensor] | None = None
    weights: dict[Key, Tensor] = field(default_factory=dict)
    projections: Projections = field(default_factory=Projections)


@dataclass(frozen=True)
class Routing:
    """The facts of one batch, and its cache. Masks are None where nothing is known about the positions: then all of
    them count.

    `segments` are None where every sample is one instance. `task_ids` (the index of each instance's task, -1 unknown)
    and `replaced` (the instances whose gates `task_mix` replaces) are kept per adapter. `starts_step` is false while
    gradients of earlier batches wait for the same optimiser step; `learns` for passes of inference, whatever mode the
    model is in. `pictured_B`: the samples with tokens of an image, where layers of the model read images.

    `carried`: the batch goes on from a key-value cache, and each sample begins in a segment whose mixing matrices
    (B x E x F) it has already. `reached_B`: the numbers of the samples' last segments (on the host), None where nobody
    told of segments. `length`: the columns of the sequence up to the end of this pass, what is cached included; `rows`
    and `width` those of the pass.
    """

    prompt_BS: Tensor | None = None
    instruction_BS: Tensor | None = None
    segments: Segments | None = None
    task_ids: Mapping[str, Tensor] = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    starts_step: bool = True
    learns: bool = True
    pictured_B: Tensor | None = None
    carried: Mapping[Key, Tensor] | None = None
    reached_B: Tensor | None = None
    length: int = 0
    rows: int = 0
    width: int = 0
    cache: RoutingCache = field(default_factory=RoutingCache)

    def __deepcopy__(self, memo: dict[int, Any]) -> Routing:
        """Itself: a copy of the key-value cache that it is kept with goes on from the same pass."""
        return self

    def mask(self, route_on: str) -> Tensor | None:
        """The routing tokens (B x S)."""
        return None if route_on == "all" else self.instruction_BS

    def segments_for(self, route_on: str) -> Segments | None:
        """The segments, where they are instances: to `all`, whole samples are, as in the released code."""
        return None if route_on == "all" else self.segments

    def check_images_of_samples(self, images: int) -> None:
        """Raises ValueError unless a layer's rows are those of one image of each sample."""
        samples = self.prompt_BS if self.pictured_B is None else self.pictured_B
        is_known = samples is not None and len(samples) == images and self.segments is None
        if not is_known or (self.pictured_B is not None and not self.pictured_B.all()):
            raise ValueError(
                "A target layer reads images, and a mixture's factors are those of a sample: whose an image is can be"
                " told only where every sample of a batch has one, as one row, and one question. Adapt the language"
                " model alone (exclude_modules), or make these layers static_modules."
            )

    def numbers_for(self, route_on: str) -> Sequence[range] | None:
        """The numbers of every sample's segments in its conversation, where they are instances and it is known."""
        if route_on == "all" or self.reached_B is None:
            return None
        if self.segments is not None:
            return self.segments.numbers
        return [range(number, number + 1) for number in self.reached_B.tolist()]

    def mean_input(self, x_BSI: Tensor, route_on: str) -> Tensor:
        """Average a layer's input over the routing tokens (N x I), once for layers that read the same tensor one after
        the other (q, k and v; gate and up). Nothing is kept alive for that.
        """
        if self.cache.pooled is not None:
            last, tokens, mean_NI = self.cache.pooled
            if last() is x_BSI and tokens == route_on:
                return mean_NI
        mask_BS, segments = self.mask(route_on), self.segments_for(route_on)
        mean_NI = mean_over(x_BSI, mask_BS) if segments is None else segments.mean(x_BSI, mask_BS)
        self.cache.pooled = (weakref.ref(x_BSI), route_on, mean_NI)
        return mean_NI

    def begins_in(self, given: Given, number_BS: Tensor | None, start: int, rows: int) -> Tensor | None:
        """The numbers of the segments (B, on the host) that a pass from column `start` of the sequence goes on from:
        those that this one has reached, or, where the cache was cut back, earlier ones whose gates it does not need.

        Raises ValueError where the cache is not as this pass left it, or the pass goes on in a segment whose gates are
        gone.
        """
        if start > self.length or (self.reached_B is not None and len(self.reached_B) != rows):
            raise ValueError(
                f"A cache of {start} tokens for {rows} sequences is not as the last pass of the mixture left it"
                f" ({self.length} tokens): its factors are selected at prefill and frozen. Run the whole prompt without"
                " past_key_values."
            )
        behind_B = given.number_before(start, rows)
        if start == self.length or self.reached_B is None or behind_B is None or number_BS is None:
            return self.reached_B
        is_earlier_B = (behind_B >= 0) & (behind_B < self.reached_B)  # -1: there is nothing but padding before the cut
        if (is_earlier_B & (number_BS == behind_B[:, None]).any(dim=1)).any():
            raise ValueError(
                "The cache was cut back into an earlier question or answer, whose factors are not kept. Cut it back to"
                " the end of an answer, or run the whole prompt without past_key_values."
            )
        return behind_B

    def at_the_end(self) -> tuple[dict[Key, Tensor], dict[Key, Tensor]]:
        """The mixing matrices of every sample's last segment (B x E x F): what layers have worked with, which a cached
        continuation goes on with; and what was selected ahead, for layers that did not run, too.
        """
        return self._at_the_end(self.cache.mixing_matrices), self._at_the_end(self.cache.selected)

    def _at_the_end(self, matrices: dict[Key, Tensor]) -> dict[Key, Tensor]:
        segments = self.segments
        if segments is None:
            return matrices
        own = {key: segments.at_the_end(mix) for key, mix in matrices.items() if len(mix) == len(segments.slot_N)}
        return {**matrices, **own}


class RoutingContext:
    """Shared by a tuner and its layers: the current `Routing`, and what the `with` block around it tells."""

    def __init__(self) -> None:
        self.current = Routing()
        self.given = Given()

    def __reduce__(self) -> tuple[type[RoutingContext], tuple[()]]:
        """A copy of a model has no batch in flight."""
        return RoutingContext, ()

    @contextmanager
    def generating(self, prompt_width: int | None) -> Iterator[None]:
        """Have passes in this block route on no column beyond those of the prompt."""
        before, self.given = self.given, replace(self.given, prompt_width=prompt_width)
        try:
            yield
        finally:
            self.given = before

    @contextmanager
    def at_columns(self, columns: slice) -> Iterator[None]:
        """Have layers see some columns of the batch alone in this block: the segments of their tokens. (Selections are
        the batch's, so that it must be known what they are made from: not the layers' own input.)
        """
        whole = self.current
        segments, width = whole.segments and whole.segments.at_columns(columns), len(range(whole.width)[columns])
        self.current = replace(whole, prompt_BS=None, instruction_BS=None, segments=segments, width=width)
        try:
            yield
        finally:
            self.current = whole


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
def routed_as(
    model: nn.Module, tasks: Tasks | None = None, *, segments: Tensor | None = None, routing_mask: Tensor | None = None
) -> Iterator[None]:
    """Tell forward passes in this block of their samples, since `generate` refuses unknown arguments: the task of each
    (or a list of tasks, one for each of its segments), and `segments` and `routing_mask` (B x S) as the collator makes
    them. The latter two are of the whole sequence, what is in a key-value cache already included; what comes after
    their end belongs to the last segment.

    Does nothing for a model without a MixLoRA adapter.
    """
    context = next((own for module in model.modules() if (own := getattr(module, CONTEXT, None)) is not None), None)
    if context is None:
        yield
        return
    before, context.given = context.given, Given(tasks, segments, routing_mask)
    try:
        yield
    finally:
        context.given = before


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
