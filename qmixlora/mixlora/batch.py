"""What a batch is routed by: its facts, conditions and selections, made before the first layer.

Shapes: B batch, N instances (B, where no sample has several segments), S sequence, D width of the condition, G routers
(one for each layer, unless layers share them), M = G x N, E = F factors in a pool, T tasks.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from peft import TaskType
from torch import Tensor, nn
from torch.nn.functional import linear

from .config import MixLoraConfig
from .given import Given
from .inputs import (
    cached_length,
    check_prompts,
    image_mask,
    image_token_ids,
    routing_masks,
    to_device,
    tokens_of,
    width_of,
)
from .layer import Linear
from .passes import Arguments, keep_with, kept_with
from .routing import OptimizerSteps, Routing, RoutingCache, RoutingContext, device_of
from .segments import Segments, Tasks, instance_labels
from .selection import no_autocast, select, weights_of


class BatchRouter:
    """The part of a tuner that makes the `Routing` of every forward pass."""

    model: Any
    active_adapters: list[str]
    peft_config: dict[str, Any]
    mixlora_routing: RoutingContext
    mixlora_task: nn.ParameterDict
    mixlora_center: nn.ModuleDict
    mixlora_layers: list[Linear]  # in the order of the model
    _steps: OptimizerSteps

    def _begin_batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Take what is told of a batch out of the arguments of a pass, and make its routing."""
        given = self.mixlora_routing.given.taken_out_of(kwargs)
        if not self._is_disabled:  # else it is a pass of the model as it is, and may stand between those of a mixture
            inputs = dict(inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments)
            self._route(inputs, given, learns=module.training and torch.is_grad_enabled())
            keep_with(inputs.values(), self.mixlora_routing.current)
        return args, kwargs

    def _end_batch(self, made: Any) -> None:
        """Have the caches that a pass has made know its routing."""
        values = made.values() if isinstance(made, Mapping) else made if isinstance(made, tuple | list) else ()
        if not self._is_disabled:
            keep_with(values, self.mixlora_routing.current)

    @property
    def _is_disabled(self) -> bool:
        return any(layer.disable_adapters for layer in self.mixlora_layers)

    @property
    def _read_questions(self) -> bool:
        return any(self._config(name).reads_questions for name in self.active_adapters)

    def _route(self, inputs: dict[str, Any], given: Given, learns: bool) -> None:
        context = self.mixlora_routing
        tokens, start = tokens_of(inputs), cached_length(inputs)
        number_BS, routing_mask_BS = given.of_pass(tokens, start)
        before = kept_with(inputs["past_key_values"]) if start else None
        begins_B = before.begins_in(given, number_BS, start, len(tokens)) if before else None
        if before and self._read_questions:
            given.check_questions(start, number_BS, routing_mask_BS, begins_B)
        carried, selected = before.at_the_end() if before else (None, {})
        segments, reached_B = Segments.of_pass(number_BS, begins_B, tokens.device)
        rows, width = len(tokens), width_of(tokens)
        layout: dict[str, Any] = {"carried": carried, "length": start + width, "rows": rows, "width": width}
        if before and carried is not None and segments is None:
            cache = RoutingCache(mixing_matrices=dict(carried), selected=selected)
            context.current = replace(before, segments=None, cache=cache, **layout)
            return
        masks = self._masks(inputs, routing_mask_BS, number_BS, segments, given.prompt_width)
        routing = Routing(segments=segments, reached_B=reached_B, learns=learns, **masks, **layout)
        task_ids, replaced = self._tasks(given.tasks, routing, tokens, learns)
        starts_step = self._steps.have_gone_on(self._a_trained_factor())
        context.current = replace(routing, task_ids=task_ids, replaced=replaced, starts_step=starts_step)
        for name in self.active_adapters:
            if self._config(name).selects_ahead:
                with no_autocast(device_of(self.model)):
                    context.current.cache.conditions[name] = self._condition(name, inputs)
                    self.select_ahead(name)

    def _masks(
        self,
        inputs: dict[str, Any],
        routing_mask_BS: Tensor | None,
        number_BS: Tensor | None,
        segments: Segments | None,
        prompt_width: int | None,
    ) -> dict[str, Any]:
        """What the inputs tell of prompts, instructions and images, as fields of a `Routing`."""
        config = self._config(self.active_adapters[0])
        image_ids = config.image_tokens or image_token_ids(getattr(self.model, "config", None))
        breaks = config.image_breaks or ()
        labels = inputs.get("labels") if config.task_type != TaskType.TOKEN_CLS else None
        if labels is not None and labels.shape != tokens_of(inputs).shape[:2]:
            labels = None  # those of samples
        inputs = {**inputs, "labels": labels}
        prompt_BS, instruction_BS = routing_masks(
            inputs, image_ids, routing_mask_BS, number_BS, segments, breaks, prompt_width
        )
        if routing_mask_BS is None and self._read_questions:
            check_prompts(prompt_BS, labels, segments)
        pictured_B = None
        if "input_ids" in inputs and any(layer.mixlora_reads_images for layer in self.mixlora_layers):
            pictured_B = image_mask(inputs["input_ids"], image_ids, breaks).any(dim=1)
        return {"prompt_BS": prompt_BS, "instruction_BS": instruction_BS, "pictured_B": pictured_B}

    def _tasks(
        self, tasks: Tasks | None, routing: Routing, tokens: Tensor, learns: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(task ids, instances whose gates are replaced) of the batch, for the adapters that need them."""
        task_ids: dict[str, Tensor] = {}
        replaced: dict[str, Tensor] = {}
        for name in self.active_adapters:
            config = self._config(name)
            if config.needs_tasks:
                ids = self._task_ids(config, tasks, len(tokens), routing.numbers_for(config.route_on))
                task_ids[name] = to_device(ids, tokens.device)
            if config.task_mix > 0 and learns:
                ids_N = task_ids[name]
                drawn_N = torch.rand(len(ids_N), device=ids_N.device) < config.task_mix
                replaced[name] = drawn_N & (ids_N >= 0) & self._has_task_mean(name, ids_N)
        return task_ids, replaced

    def _a_trained_factor(self) -> nn.Parameter | None:
        """A factor pool that learns, which tells optimiser steps apart."""
        pools = (pool for layer in self.mixlora_layers for pool in layer.mixlora_B.values())
        return next((pool for pool in pools if pool.requires_grad), None)

    def _layers_of(self, name: str) -> list[Linear]:
        return [layer for layer in self.mixlora_layers if name in layer.mixlora_config]

    def _config(self, name: str) -> MixLoraConfig:
        return cast(MixLoraConfig, self.peft_config[name])

    def _condition(self, name: str, inputs: dict[str, Any]) -> Tensor:
        """The condition (N x D, fp32), where it is known before the first layer."""
        routing = self.mixlora_routing.current
        if self._config(name).route_on == "task":
            table_TD, ids_N = self.mixlora_task[name], routing.task_ids[name]
            return torch.where((ids_N >= 0)[:, None], table_TD[ids_N.clamp(min=0)], table_TD.mean(dim=0))
        embeddings_BSD = inputs.get("inputs_embeds")
        if embeddings_BSD is None:
            embeddings_BSD = self.model.get_input_embeddings()(inputs["input_ids"])
        condition_ND = routing.mean_input(embeddings_BSD, "embedding")
        if name not in self.mixlora_center:
            return condition_ND
        centred_ND: Tensor = self.mixlora_center[name](condition_ND, routing)
        return centred_ND

    def select_ahead(self, name: str) -> None:
        """Select for every layer at once: one product in place of one per router, and nothing to recompute."""
        routing, config, layers = self.mixlora_routing.current, self._config(name), self._layers_of(name)
        cache, condition_ND = routing.cache, routing.cache.conditions[name]
        routers = {layer.mixlora_router[name]: layer for layer in layers if name in layer.mixlora_route_A}

        def logits(router: str) -> Tensor:
            route_XD = torch.cat([getattr(layer, router)[name] for layer in routers.values()])
            logits_NGE = linear(condition_ND, route_XD.float()).unflatten(1, (len(routers), -1))
            logits_ME: Tensor = logits_NGE.transpose(0, 1).flatten(0, 1)
            return logits_ME

        def by_layer(made_M: Tensor) -> dict[tuple[nn.Module, str], Tensor]:
            of_router = dict(zip(routers, made_M.chunk(len(routers)), strict=True))
            return {(layer, name): of_router[layer.mixlora_router[name]] for layer in layers}

        def conditional(chosen_MR: Tensor) -> Tensor:
            of_layer = zip(routers.values(), chosen_MR.chunk(len(routers)), strict=True)
            return torch.cat([layer.conditional(chosen_NR, name) for layer, chosen_NR in of_layer])

        on_B = (logits("mixlora_route_B"), conditional) if config.is_conditional else ()
        mix_MEF = select(config, logits("mixlora_route_A"), *on_B)
        cache.selected.update(by_layer(mix_MEF))
        if routing.carried is None and name not in routing.replaced:  # these change selections, layer by layer
            cache.weights.update(by_layer(weights_of(config, mix_MEF, layers[0].compute_dtype)))

    def _task_ids(
        self, config: MixLoraConfig, tasks: Tasks | None, rows: int, numbers: Sequence[range] | None
    ) -> list[int]:
        """Index of each instance's task in the adapter's list (N), -1 where it is unknown."""
        known = {task: index for index, task in enumerate(config.tasks or ())}
        labels = instance_labels([""] if tasks is None else tasks, rows, numbers)
        ids = [known.get(task, -1) for task in labels]
        if config.route_on == "task" and min(ids) < 0:
            missing = "no task labels" if tasks is None else f"tasks {sorted(set(labels) - set(known))}"
            warnings.warn(f"The adapter knows {config.tasks}; {missing} get the mean over tasks.", stacklevel=2)
        return ids

    def _has_task_mean(self, name: str, task_ids_N: Tensor) -> Tensor:
        """Whether a task has been seen, so that its running mean means something (N)."""
        layer = next(layer for layer in self.mixlora_layers if name in layer.mixlora_task_count)
        seen_N: Tensor = layer.mixlora_task_count[name][task_ids_N] > 0
        return seen_N
