"""MixLoRA as a PEFT tuner: injects the layers, and makes the routing of every batch.

Shapes: B batch, N instances (B, where no sample has several segments), S sequence, D width of the condition, L layers,
G routers (L, unless layers share them), M = G x N, E = F factors in a pool, T tasks.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.nn.functional import linear

from .config import MixLoraConfig, router_of
from .inputs import cached_length, image_token_ids, routing_masks, to_device, tokens_of, width_of
from .layer import MERGE_REFUSED, Linear, MixLoraLayer
from .routing import OptimizerSteps, Routing, RoutingCache, RoutingContext, device_of
from .running_means import Center
from .segments import Segments, Tasks, instance_labels
from .selection import no_autocast, select, weights_of
from .siblings import join_siblings
from .static import with_static_adapter


class MixLoraModel(BaseTuner):
    """Wraps a model for `get_peft_model` / `PeftModel.from_pretrained` with a `MixLoraConfig`.

    The wrapped model's forward accepts three more keyword arguments: `segments` (B x S, the number of every token's
    segment, -1 on padding; without them a sample is one segment), `routing_mask` (B x S, true on the questions' tokens;
    derived from `attention_mask` and `labels` if missing) and `tasks` (B task labels, or lists of one for each
    segment). `generate` takes them through `with routed_as(model, tasks, ...):` instead.
    """

    prefix = "mixlora_"
    tuner_layer_cls = BaseTunerLayer  # MixLoraLayer, and StaticLinear
    target_module_mapping = cast(dict[str, list[str]], TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)
    uses_shared_state = True  # the task vectors and the centre, which all layers read
    mixlora_task: nn.ParameterDict
    mixlora_center: nn.ModuleDict
    mixlora_layers: list[Linear]  # in the order of the model

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.mixlora_routing = RoutingContext()
        self.mixlora_task = nn.ParameterDict()
        self.mixlora_center = nn.ModuleDict()
        self.mixlora_layers = []
        self._steps = OptimizerSteps()
        self._hook = model.register_forward_pre_hook(self._begin_batch, with_kwargs=True)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Inject as `BaseTuner.inject_adapter`, with the state that all layers share: the table of task vectors
        (T x D), if the adapter routes on tasks; the centre of the conditions, if it routes on embeddings.
        """
        config = self._config(adapter_name)
        if config.route_on == "embedding" and not hasattr(model, "get_input_embeddings"):
            raise ValueError(
                f"route_on='embedding' needs a model with input embeddings, and {type(model).__name__} has no "
                "get_input_embeddings(). Route on 'instruction', 'all' or 'task'."
            )
        if config.route_on == "task":
            table_TD = torch.randn(len(config.tasks or ()), config.task_dim, device=device_of(model))
            self.mixlora_task[adapter_name] = nn.Parameter(table_TD)
        elif config.route_on == "embedding" and config.condition_norm == "center":
            width = cast(Any, model).get_input_embeddings().embedding_dim
            self.mixlora_center[adapter_name] = Center(width, device=device_of(model))
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, MixLoraConfig), "PEFT maps this tuner to its config"
        if peft_config.is_static(current_key):
            self._replace_module(parent, target_name, with_static_adapter(target, adapter_name, peft_config), target)
            return
        condition_dim = None
        if peft_config.route_on == "embedding":
            condition_dim = self.model.get_input_embeddings().embedding_dim
        elif peft_config.route_on == "task":
            condition_dim = peft_config.task_dim
        router = router_of(current_key, peft_config.router)
        shared = (layer.mixlora_router.get(adapter_name) for layer in self.mixlora_layers)
        has_router = router not in shared
        if isinstance(target, MixLoraLayer):
            target.update_layer(adapter_name, peft_config, condition_dim, router, has_router)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, nn.Linear):
            raise ValueError(
                f"MixLoRA adapts nn.Linear and bitsandbytes Linear4bit layers; {current_key} is a "
                f"{type(base).__name__}. Name linear layers in target_modules."
            )
        layer = Linear(target, adapter_name, peft_config, self.mixlora_routing, condition_dim, router, has_router)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        join_siblings(layer, parent, target_name)
        self._replace_module(parent, target_name, layer, target)
        self.mixlora_layers.append(layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a module in place. The base class would also hand on a `weight`, which fails for a projector in
        `modules_to_save` when the adapter is unloaded (peft 0.21); the layer places its parameters itself.
        """
        setattr(parent, child_name, new_module)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set as `BaseTuner.set_adapter`, the task vectors included (frozen under hard gates, like the routers)."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for name, table_TD in self.mixlora_task.items():
            learns = self._config(name).gate != "hard"
            table_TD.requires_grad_(learns and name in self.active_adapters and not inference_mode)

    def unload(self) -> nn.Module:
        """Unload as `BaseTuner.unload`, and remove the hook that makes the routing of every batch."""
        self._hook.remove()
        return super().unload()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete as `BaseTuner.delete_adapter`, and from the state that all layers share."""
        super().delete_adapter(adapter_name)
        for held in (self.mixlora_task, self.mixlora_center):
            if adapter_name in held:
                del held[adapter_name]

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> NoReturn:
        """Always raises NotImplementedError: see the message."""
        raise NotImplementedError(MERGE_REFUSED)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> NoReturn:
        """Always raises NotImplementedError: see the message."""
        raise NotImplementedError(MERGE_REFUSED)

    def last_selection(self) -> Tensor:
        """The mixing matrices of the batch that was last in the model, by the (one) active adapter, in the order of the
        layers (L x N x E x F, fp32, without a graph). `task_mix` does not show: every instance has its own selection.
        """
        cache, name = self.mixlora_routing.current.cache, self.active_adapters[0]
        matrices = {**cache.selected, **cache.mixing_matrices}  # a layer that reads images is skipped without any
        return torch.stack([matrices[layer, name].detach() for layer in self.mixlora_layers])

    def last_labels(self, tasks: Tasks) -> list[str]:
        """The task of every instance of that batch (N), from those of its samples."""
        numbers = self.mixlora_routing.current.numbers_for(self._config(self.active_adapters[0]).route_on)
        return instance_labels(tasks, len(tasks), numbers)

    # -- the batch in flight ------------------------------------------------------------------------------------------

    def _begin_batch(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        context = self.mixlora_routing
        before, given = context.current, context.given.taken_out_of(kwargs)
        inputs = dict(inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments)
        tokens, start = tokens_of(inputs), cached_length(inputs)
        number_BS, routing_mask_BS = given.of_pass(tokens, start)
        begins_B = before.begins_in(given, number_BS, start, len(tokens)) if start else None
        segments, reached_B = Segments.of_pass(number_BS, begins_B, tokens.device)
        carried, selected = before.at_the_end() if start else (None, {})
        width = width_of(tokens)
        length = start + width
        if carried is not None and segments is None:
            cache = RoutingCache(mixing_matrices=dict(carried), selected=selected)
            context.current = replace(before, segments=None, carried=carried, length=length, width=width, cache=cache)
            return args, kwargs
        config = self._config(self.active_adapters[0])
        image_ids = config.image_tokens or image_token_ids(getattr(module, "config", None))
        prompt_BS, instruction_BS = routing_masks(
            inputs, image_ids, routing_mask_BS, number_BS, segments, config.image_breaks or ()
        )
        routing = Routing(
            prompt_BS, instruction_BS, segments, carried=carried, reached_B=reached_B, length=length, width=width
        )
        task_ids, replaced = self._tasks(given.tasks, routing, tokens, module.training)
        starts_step = self._steps.have_gone_on(self._a_trained_factor())
        context.current = replace(routing, task_ids=task_ids, replaced=replaced, starts_step=starts_step)
        for name in self.active_adapters:
            config = self._config(name)
            if config.selects_ahead:
                with no_autocast(device_of(module)):
                    context.current.cache.conditions[name] = self._condition(name, inputs)
                    self.select_ahead(name)
        return args, kwargs

    def _tasks(
        self, tasks: Tasks | None, routing: Routing, tokens: Tensor, training: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(task ids, instances whose gates are replaced) of the batch, for the adapters that need them."""
        task_ids: dict[str, Tensor] = {}
        replaced: dict[str, Tensor] = {}
        for name in self.active_adapters:
            config = self._config(name)
            if config.needs_tasks:
                ids = self._task_ids(config, tasks, len(tokens), routing.numbers_for(config.route_on))
                task_ids[name] = to_device(ids, tokens.device)
            if config.task_mix > 0 and training:
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
            embeddings_BSD = cast(Any, self.model).get_input_embeddings()(inputs["input_ids"])
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
            logits_NGE = linear(condition_ND, route_XD).unflatten(1, (len(routers), -1))
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
