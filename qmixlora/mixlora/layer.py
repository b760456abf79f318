"""The adapted linear layer.

Shapes: B batch, S sequence, X = B S, N instances (B, where no sample has several segments), I in-features, O
out-features, D width of the condition, E = F factors in a pool, Y = E times the siblings, R active factors, T tasks.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NoReturn, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional

from .config import MixLoraConfig
from .routing import Key, RoutingContext
from .running_means import Center, update_means
from .selection import conditional_scores, no_autocast, released_conditional_scores, select, weights_of
from .siblings import stacked_pools

ROUTERS = ("mixlora_route_A", "mixlora_route_B", "mixlora_route_AB")
MERGE_REFUSED = (
    "A live mixture cannot be merged: its update differs from input to input, and no single weight equals it. "
    "Use the exporter instead (`qmixlora export RUN --task T --as merged`): it turns each task's mean update into an "
    "ordinary adapter or checkpoint and reports what that loses."
)


class MixLoraLayer(BaseTunerLayer):
    """Parameters of all adapters on one layer; names and shapes as in the PEFT state dict.

    `mixlora_A` E x I · `mixlora_B` E x O · `mixlora_route_A`, `mixlora_route_B` E x D · `mixlora_route_AB` R x I x E,
    all fp32. `route_B` and `route_AB` exist where the pairing is conditional. Of layers that share
    a router (`mixlora_router` names it, per adapter), the first has it, and the others none. With `task_mix` the
    running means `mixlora_task_mean` (T x E x F) and their counts `mixlora_task_count` (T) are saved along.
    """

    training: bool
    mixlora_A: nn.ParameterDict
    mixlora_B: nn.ParameterDict
    mixlora_route_A: nn.ParameterDict
    mixlora_route_AB: nn.ParameterDict
    mixlora_siblings: list[Linear]  # the layers that read the same input, this one among them
    adapter_layer_names = ("mixlora_A", "mixlora_B", *ROUTERS)
    other_param_names = (
        "mixlora_task_mean",
        "mixlora_task_count",
        "mixlora_center",
        "mixlora_config",
        "mixlora_router",
    )

    def __init__(self, base_layer: nn.Module, context: RoutingContext) -> None:
        self.base_layer = base_layer
        self.mixlora_context = context
        self.in_features = cast(int, base_layer.in_features)
        self.out_features = cast(int, base_layer.out_features)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.mixlora_task_mean = BufferDict(persistent=True)
        self.mixlora_task_count = BufferDict(persistent=True)
        self.mixlora_center = nn.ModuleDict()
        self.mixlora_config: dict[str, MixLoraConfig] = {}
        self.mixlora_router: dict[str, str] = {}
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.mixlora_reads_images = False  # in place of tokens

    def update_layer(
        self, adapter_name: str, config: MixLoraConfig, condition_dim: int | None, router: str, has_router: bool
    ) -> None:
        """Add an adapter to this layer: factor pool A Kaiming uniform, pool B zero, routers as `nn.Linear`.

        `condition_dim` is D where the condition is not the layer's own input; `router` names the router that selects
        for this layer, which this layer has or not. Everything is fp32, whatever the layer's dtype, and on the layer's
        device; a fresh adapter leaves the output unchanged.
        """
        e, r, i, d = config.num_factors, config.r, self.in_features, condition_dim or self.in_features
        base_weight = cast(nn.Linear, self.get_base_layer()).weight
        fp32: dict[str, Any] = {"dtype": torch.float32, "device": base_weight.device}
        parameters = {"mixlora_A": torch.empty(e, i, **fp32), "mixlora_B": torch.zeros(e, self.out_features, **fp32)}
        if has_router:
            parameters["mixlora_route_A"] = torch.empty(e, d, **fp32)
        if has_router and config.is_conditional:
            parameters["mixlora_route_B"] = torch.empty(e, d, **fp32)
        if config.is_conditional:
            parameters["mixlora_route_AB"] = torch.empty(r, i, e, **fp32)
        for name, tensor in parameters.items():
            if name == "mixlora_route_AB":  # R linear maps from I to E; torch would take the fan-in from the wrong axis
                nn.init.uniform_(tensor, -1 / math.sqrt(i), 1 / math.sqrt(i))
            elif name != "mixlora_B":
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
            getattr(self, name)[adapter_name] = nn.Parameter(tensor)
        if config.task_mix > 0:
            tasks = len(config.tasks or ())
            self.mixlora_task_mean[adapter_name] = torch.zeros(tasks, e, e, **fp32)
            self.mixlora_task_count[adapter_name] = torch.zeros(tasks, **fp32)
        if config.condition_norm == "center" and condition_dim is None:
            self.mixlora_center[adapter_name] = Center(i, **fp32)
        self.mixlora_config[adapter_name], self.mixlora_router[adapter_name] = config, router
        if config.gate == "hard":  # no gradient reaches a router through unweighted selection
            self.frozen_peft_weight_names[adapter_name] = ROUTERS
        self.set_adapter(self.active_adapters)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Always raises NotImplementedError: see the message."""
        raise NotImplementedError(MERGE_REFUSED)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of this layer's input and output, as far as the base layer tells it."""
        base = cast(Any, self.get_base_layer())
        dtype: torch.dtype = getattr(base, "compute_dtype", None) or base.weight.dtype
        return dtype if dtype.is_floating_point else torch.get_default_dtype()

    def _key(self, adapter_name: str) -> Key:
        return cast(nn.Module, self), adapter_name

    def mixing(self, x_BSI: Tensor, adapter_name: str) -> Tensor:
        """The mixing matrices of this batch (`mix_NEF`): selected from the condition, or, while decoding, at prefill.

        Raises ValueError if this layer's input is not laid out as the model's own (batch, sequence).
        """
        routing, config = self.mixlora_context.current, self.mixlora_config[adapter_name]
        cache, key, segments = routing.cache, self._key(adapter_name), routing.segments_for(config.route_on)
        carried_BEF = None
        if routing.carried is not None:
            carried_BEF = routing.carried.get(key)
            if carried_BEF is None or len(carried_BEF) != len(x_BSI):
                raise ValueError(
                    f"Cached decoding of {len(x_BSI)} sequences without a prefill of the same batch through this "
                    "adapter: its factors are selected at prefill and frozen. Run the prompt without past_key_values."
                )
            if segments is None:
                if routing.reached_B is not None and x_BSI.shape[1] != routing.width and routing.reached_B.any():
                    _check_layout(x_BSI, torch.Size((len(x_BSI), routing.width)), "segments need", "'all'")
                cache.mixing_matrices[key] = carried_BEF
                return carried_BEF
        mix_NEF = cache.selected.get(key)
        if mix_NEF is None:
            mix_NEF = self._select(x_BSI, adapter_name)
        if carried_BEF is not None and segments is not None:
            mix_NEF = segments.going_on_with(mix_NEF, carried_BEF)
        cache.mixing_matrices[key] = mix_NEF.detach()
        if config.task_mix > 0 and self.training and routing.learns:
            mix_NEF = self._mixed_with_task_mean(mix_NEF, adapter_name)
        return mix_NEF

    def _select(self, x_BSI: Tensor, adapter_name: str) -> Tensor:
        config = self.mixlora_config[adapter_name]
        route_A, route_B, _ = (getattr(self, name).get(adapter_name) for name in ROUTERS)
        with no_autocast(x_BSI.device):
            condition_ND = self._condition(x_BSI, adapter_name)
            logits_A_NE = condition_ND @ route_A.float().T
            if not config.is_conditional:
                return select(config, logits_A_NE)
            conditional = partial(self.conditional, adapter_name=adapter_name)
            return select(config, logits_A_NE, condition_ND @ route_B.float().T, conditional)

    def conditional(self, chosen_NR: Tensor, adapter_name: str) -> Tensor:
        """What the CFS router adds to the scores of B (N x E), given the factors chosen from A."""
        is_released = self.mixlora_config[adapter_name].pairing == "released"
        scores = released_conditional_scores if is_released else conditional_scores
        route_RIE: Tensor = self.mixlora_route_AB[adapter_name]
        return scores(chosen_NR, self.mixlora_A[adapter_name], route_RIE)

    def _condition(self, x_BSI: Tensor, adapter_name: str) -> Tensor:
        """The condition (N x D, fp32): the batch's own, or the mean of this layer's input, centred."""
        routing, route_on = self.mixlora_context.current, self.mixlora_config[adapter_name].route_on
        if adapter_name in routing.cache.conditions:
            return routing.cache.conditions[adapter_name]
        if self.mixlora_config[adapter_name].selects_ahead:
            raise ValueError(
                "A layer of the mixture works outside of a pass through its model, which selects its factors: call the"
                " model, or the part of it that holds the decoder."
            )
        if (mask_BS := routing.mask(route_on)) is not None:
            _check_layout(x_BSI, mask_BS.shape, f"route_on={route_on!r} needs", "'all' or 'embedding'")
        mean_NI = routing.mean_input(x_BSI, route_on)
        if adapter_name not in self.mixlora_center:
            return mean_NI
        centred_NI: Tensor = self.mixlora_center[adapter_name](mean_NI, routing)
        return centred_NI

    def _mixed_with_task_mean(self, mix_NEF: Tensor, adapter_name: str) -> Tensor:
        routing, key = self.mixlora_context.current, self._key(adapter_name)
        task_means, task_ids_N = routing.cache.task_means, routing.task_ids[adapter_name]
        if key not in task_means:  # the first pass over this batch, not its recomputation
            mean_TEF, count_T = self.mixlora_task_mean[adapter_name], self.mixlora_task_count[adapter_name]
            task_means[key] = mean_TEF[task_ids_N]
            update_means(mean_TEF, count_T, mix_NEF.detach(), task_ids_N)
        replaced_N = routing.replaced[adapter_name]
        return torch.where(replaced_N[:, None, None], task_means[key], mix_NEF)

    def add_update(self, result: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        """`result + (alpha / R) * ((x A^T) mix) B`; an I x O matrix is never built.

        `x` is B x S x I; a matrix N x I is B x S flattened if the batch says so, else N instances of one position.
        """
        x_BSI = self._by_sample(x)
        weight_N = self._weight(x_BSI, adapter_name)
        mixed_BSF = self._mixed(self._projected(x, x_BSI, adapter_name), weight_N, adapter_name)
        mixed_XF, pool_B_FO = mixed_BSF.flatten(0, 1), self.mixlora_B[adapter_name]
        total_XO = torch.addmm(result.flatten(0, -2), mixed_XF.to(result.dtype), pool_B_FO.to(result.dtype))
        return total_XO.view(result.shape)

    def _by_sample(self, x: Tensor) -> Tensor:
        """The input as B x S x I."""
        if x.dim() == 2:
            routing = self.mixlora_context.current
            is_flat = not self.mixlora_reads_images and len(x) == routing.rows * routing.width
            x = x.view(routing.rows if is_flat else len(x), -1, x.shape[-1])
        return x.flatten(1, -2)

    def _weight(self, x_BSI: Tensor, adapter_name: str) -> Tensor:
        """What the instances' `x A^T` are mixed with, scaled: gates (N x E) or matrices (N x E x F)."""
        mix_NEF = self.mixing(x_BSI, adapter_name)
        weight_N = self.mixlora_context.current.cache.weights.get(self._key(adapter_name))
        if weight_N is None:
            weight_N = weights_of(self.mixlora_config[adapter_name], mix_NEF, x_BSI.dtype)
        return weight_N.to(x_BSI.dtype)

    def _projected(self, x: Tensor, x_BSI: Tensor, adapter_name: str) -> Tensor:
        """`x A^T` (B x S x E) with dropout on `x`, computed for all layers that read this input when the first asks."""
        layer, cache = cast(Linear, self), self.mixlora_context.current.cache
        h_BSE = cache.projections.take(layer, adapter_name, x)
        if h_BSE is None:
            x_BSI = functional.dropout(x_BSI, self.mixlora_config[adapter_name].dropout, self.training)
            pools_YI = stacked_pools(layer, adapter_name).to(x_BSI.dtype)
            h_XY = functional.linear(x_BSI.flatten(0, 1), pools_YI)
            cache.projections.keep(layer, adapter_name, x, h_XY.unflatten(0, x_BSI.shape[:2]))
            h_BSE = cache.projections.take(layer, adapter_name, x)
            assert h_BSE is not None, "a layer is among its siblings"
        return h_BSE

    def _mixed(self, h_BSE: Tensor, weight_N: Tensor, adapter_name: str) -> Tensor:
        """`h mix` (B x S x F) of every instance."""
        if self.mixlora_reads_images:
            self.mixlora_context.current.check_images_of_samples(len(h_BSE))
        segments = self.mixlora_context.current.segments_for(self.mixlora_config[adapter_name].route_on)
        if segments is not None:
            _check_layout(h_BSE, segments.of_BSK.shape[:2], "segments need", "'all'")
            return segments.mixed(h_BSE, weight_N)
        rows, instances = len(h_BSE), len(weight_N)
        if rows > instances and rows % instances == 0:  # cross-attention: a row for every tile of an image
            weight_N = weight_N.repeat_interleave(rows // instances, dim=0)
        return h_BSE * weight_N[:, None] if weight_N.dim() == 2 else h_BSE @ weight_N


def _check_layout(x_BSI: Tensor, expected: torch.Size, needs: str, instead: str) -> None:
    """Raises ValueError for a layer whose input is not laid out as the model's own."""
    if x_BSI.shape[:2] != expected:
        raise ValueError(
            f"{needs} layer inputs laid out (batch, sequence) = {tuple(expected)}, but a target layer got "
            f"{tuple(x_BSI.shape[:2])}: it reads something else than the tokens of the pass (an image's states, or "
            "latents of the whole cache). Leave such layers out of target_modules. "
            f"Or route on {instead}."
        )


class Linear(nn.Module, MixLoraLayer):
    """MixLoRA around an `nn.Linear`, a bitsandbytes `Linear4bit` among them: only the base layer's forward differs."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: MixLoraConfig,
        context: RoutingContext,
        condition_dim: int | None,
        router: str,
        has_router: bool,
    ) -> None:
        super().__init__()
        MixLoraLayer.__init__(self, base_layer, context)
        self._active_adapter = adapter_name
        self.mixlora_siblings = [self]
        self.update_layer(adapter_name, config, condition_dim, router, has_router)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the update of every active adapter, shape and dtype as the base layer's."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for adapter_name in cast(list[str], self.active_adapters):
            if adapter_name in self.mixlora_config:
                result = self.add_update(result, x, adapter_name)
        return result

    def __repr__(self) -> str:
        return "mixlora." + super().__repr__()
