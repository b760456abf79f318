"""MixLoRA as a PEFT tuner: injects the layers and tells them about the batch in flight.

Shapes: B batch, D width of the condition, L layers, N = L x B, E = F factors in a pool, T tasks.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any, NoReturn, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from .config import MixLoraConfig
from .layer import MERGE_REFUSED, Linear, MixLoraLayer
from .routing import Routing, RoutingContext, device_of, image_token_ids, is_decoding, no_autocast, routing_masks
from .running_means import Center
from .selection import mean_over, select


class MixLoraModel(BaseTuner):
    """Wraps a model for `get_peft_model` / `PeftModel.from_pretrained` with a `MixLoraConfig`.

    The wrapped model's forward accepts two more keyword arguments: `routing_mask` (B x S, true on the prompt's tokens;
    derived from `attention_mask` and `labels` if missing) and `tasks` (B task labels). `generate` takes the labels
    through `with routed_as(model, tasks):` instead.
    """

    prefix = "mixlora_"
    tuner_layer_cls = MixLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    uses_shared_state = True  # the task vectors and the centre, which all layers read
    mixlora_task: nn.ParameterDict
    mixlora_center: nn.ModuleDict
    mixlora_layers: list[Linear]  # in the order of the model
    _seen_version: int

    def _pre_injection_hook(self, model: nn.Module, config: MixLoraConfig, adapter_name: str) -> None:
        self.mixlora_routing = RoutingContext()
        self.mixlora_task = nn.ParameterDict()
        self.mixlora_center = nn.ModuleDict()
        self.mixlora_layers = []
        self._seen_version = -1
        self._hook = model.register_forward_pre_hook(self._begin_batch, with_kwargs=True)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As `BaseTuner.inject_adapter`, with what all layers share: the table of task vectors (T x D), if the adapter
        routes on tasks; the centre of the conditions, if it routes on embeddings.
        """
        config = self.peft_config[adapter_name]
        if config.route_on == "embedding" and not hasattr(model, "get_input_embeddings"):
            raise ValueError(
                f"route_on='embedding' needs a model with input embeddings, and {type(model).__name__} has no "
                "get_input_embeddings(). Route on 'instruction', 'prompt', 'all' or 'task'."
            )
        if config.route_on == "task":
            table_TD = torch.randn(len(config.tasks), config.task_dim, device=device_of(model))
            self.mixlora_task[adapter_name] = nn.Parameter(table_TD)
        elif config.route_on == "embedding" and config.condition_norm == "center":
            width = cast(Any, model).get_input_embeddings().embedding_dim
            self.mixlora_center[adapter_name] = Center(width, device=device_of(model))
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)

    def _create_and_replace(
        self,
        peft_config: MixLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        condition_dim = None
        if peft_config.route_on == "embedding":
            condition_dim = self.model.get_input_embeddings().embedding_dim
        elif peft_config.route_on == "task":
            condition_dim = peft_config.task_dim
        if isinstance(target, MixLoraLayer):
            target.update_layer(adapter_name, peft_config, condition_dim)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, nn.Linear):
            raise ValueError(
                f"MixLoRA adapts nn.Linear and bitsandbytes Linear4bit layers; {current_key} is a "
                f"{type(base).__name__}. Name linear layers in target_modules."
            )
        layer = Linear(target, adapter_name, peft_config, self.mixlora_routing, condition_dim)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
        self.mixlora_layers.append(layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a module in place. The base class would also hand on a `weight`, which fails for a projector in
        `modules_to_save` when the adapter is unloaded (peft 0.21); the layer places its parameters itself.
        """
        setattr(parent, child_name, new_module)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As `BaseTuner.set_adapter`, the task vectors included (frozen under hard gates, like the routers)."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for name, table_TD in self.mixlora_task.items():
            learns = self.peft_config[name].gate != "hard"
            table_TD.requires_grad_(learns and name in self.active_adapters and not inference_mode)

    def unload(self) -> nn.Module:
        """As `BaseTuner.unload`: the base model as it was, without what tells the layers about the batch."""
        self._hook.remove()
        return cast(nn.Module, super().unload())

    def delete_adapter(self, adapter_name: str) -> None:
        """As `BaseTuner.delete_adapter`, what all layers share included."""
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

    # -- the batch in flight ------------------------------------------------------------------------------------------

    def _begin_batch(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        routing_mask_BS, tasks = kwargs.pop("routing_mask", None), kwargs.pop("tasks", None)
        context = self.mixlora_routing
        inputs = dict(inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments)
        if is_decoding(inputs):
            context.current.decoding = True
            return args, kwargs
        prompt_BS, instruction_BS = routing_masks(
            inputs, routing_mask_BS, image_token_ids(getattr(module, "config", None))
        )
        routing = context.current = Routing(prompt_BS, instruction_BS, starts_step=self._starts_step())
        tasks = context.tasks if tasks is None else tasks
        for name in self.active_adapters:
            config = self.peft_config[name]
            if config.needs_tasks:
                routing.task_ids[name] = self._task_ids(config, tasks, inputs)
            if config.task_mix > 0 and module.training:
                ids_B = routing.task_ids[name]
                drawn_B = torch.rand(len(ids_B), device=ids_B.device) < config.task_mix
                routing.replaced[name] = drawn_B & (ids_B >= 0) & self._has_task_mean(name, ids_B)
            if config.route_on in ("embedding", "task"):
                with no_autocast(device_of(module)):
                    routing.conditions[name] = self._condition(name, inputs)
                    if config.pairing in ("tied", "independent"):
                        self._select_ahead(name)
        return args, kwargs

    def _starts_step(self) -> bool:
        """Whether the optimiser has stepped since the last batch, as far as a trained tensor tells: its gradient was
        cleared, or (`zero_grad(set_to_none=False)`) its values were changed in place.
        """
        for layer in self.mixlora_layers:
            for parameter in cast(nn.ParameterDict, layer.mixlora_B).values():
                if parameter.requires_grad:
                    before, self._seen_version = self._seen_version, parameter._version
                    return parameter.grad is None or parameter._version != before
        return True

    def _condition(self, name: str, inputs: dict[str, Any]) -> Tensor:
        """What to route on (B x D, fp32), where that is known before the first layer."""
        routing = self.mixlora_routing.current
        if self.peft_config[name].route_on == "task":
            table_TD, ids_B = self.mixlora_task[name], routing.task_ids[name]
            return torch.where((ids_B >= 0)[:, None], table_TD[ids_B.clamp(min=0)], table_TD.mean(dim=0))
        embeddings_BSD = inputs.get("inputs_embeds")
        if embeddings_BSD is None:
            embeddings_BSD = cast(Any, self.model).get_input_embeddings()(inputs["input_ids"])
        condition_BD = mean_over(embeddings_BSD, routing.instruction_BS)
        if name not in self.mixlora_center:
            return condition_BD
        centred_BD: Tensor = self.mixlora_center[name](condition_BD, routing)
        return centred_BD

    def _select_ahead(self, name: str) -> None:
        """Every layer's selection at once, where the scores do not depend on a layer's factors: one product in place of
        one per layer, and nothing to recompute.
        """
        routing, config = self.mixlora_routing.current, self.peft_config[name]
        layers = [layer for layer in self.mixlora_layers if name in layer.mixlora_config]
        condition_BD = routing.conditions[name]

        def logits(router: str) -> Tensor:
            route_LED = torch.stack([getattr(layer, router)[name] for layer in layers])
            return torch.einsum("bd,led->lbe", condition_BD, route_LED).flatten(0, 1)

        logits_B_NE = None if config.pairing == "tied" else logits("mixlora_route_B")
        mix_NEF = select(config, logits("mixlora_route_A"), logits_B_NE)
        for layer, mix_BEF in zip(layers, mix_NEF.chunk(len(layers)), strict=True):
            routing.selected[layer, name] = mix_BEF

    def _task_ids(self, config: MixLoraConfig, tasks: Any, inputs: dict[str, Any]) -> Tensor:
        """Index of each sample's task in the adapter's list (B), -1 where it is unknown; beams repeat their sample."""
        reference = next(value for value in inputs.values() if isinstance(value, Tensor))
        if tasks is None:
            ids = [-1] * len(reference)
        else:
            known = {task: index for index, task in enumerate(config.tasks or ())}
            ids = [known.get(task, -1) for task in tasks]
            if len(reference) % len(ids):
                raise ValueError(f"{len(ids)} task labels for a batch of {len(reference)}: give one per sample.")
        if config.route_on == "task" and min(ids) < 0:
            missing = "no task labels" if tasks is None else f"tasks {sorted(set(tasks) - set(config.tasks or ()))}"
            warnings.warn(f"The adapter knows {config.tasks}; {missing} get the mean over tasks.", stacklevel=2)
        return torch.tensor(ids, device=reference.device).repeat_interleave(len(reference) // len(ids))

    def _has_task_mean(self, name: str, task_ids_B: Tensor) -> Tensor:
        """Whether a task has been seen, so that its running mean means something (B)."""
        layer = next(layer for layer in self.mixlora_layers if name in layer.mixlora_task_count)
        seen_B: Tensor = layer.mixlora_task_count[name][task_ids_B] > 0
        return seen_B
