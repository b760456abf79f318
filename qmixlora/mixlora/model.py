"""MixLoRA as a PEFT tuner: puts the layers into a model, and takes them out of it.

Shapes: B batch, N instances (B, where no sample has several segments), S sequence, D width of the condition, L layers,
E = F factors in a pool, T tasks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from .batch import BatchRouter
from .config import MixLoraConfig, ends_in, router_of
from .layer import MERGE_REFUSED, Linear, MixLoraLayer
from .passes import Passes, name_of_decoder
from .routing import OptimizerSteps, RoutingContext, device_of
from .running_means import Center
from .segments import Tasks, instance_labels
from .siblings import join_siblings
from .static import StaticLinear, with_static_adapter


class MixLoraModel(BatchRouter, BaseTuner):
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

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"{type(model).__name__} has an encoder of its own for the prompt, and a mixture is routed on the"
                " tokens that the decoder reads. Use a model that reads both as one sequence, or plain LoRA."
            )
        if _taken_off(model):
            warnings.warn(
                "The model had MixLoRA layers of an earlier get_peft_model or from_pretrained. They were taken off: to"
                " have several adapters, use add_adapter or load_adapter of the model that these gave.",
                stacklevel=2,
            )
        self.mixlora_routing = RoutingContext()
        self.mixlora_task = nn.ParameterDict()
        self.mixlora_center = nn.ModuleDict()
        self.mixlora_layers = []
        self._steps = OptimizerSteps()
        self._decoder = name_of_decoder(model)
        self._passes = Passes(model, self._begin_batch, self._end_batch, self.mixlora_routing.generating)

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

        Raises ValueError if the adapter fits no layers, or none would be routed. The model is then as it was, unless it
        has other adapters.
        """
        try:
            self._inject(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception:
            if len(self.peft_config) == 1:
                _taken_off(model)
            raise

    def _inject(self, model: nn.Module, adapter_name: str, *how: Any) -> None:
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
        super().inject_adapter(model, adapter_name, *how)
        static = [name for name, module in model.named_modules() if isinstance(module, StaticLinear)]
        if unknown := [end for end in config.static_modules or () if not any(ends_in(name, end) for name in static)]:
            raise ValueError(f"static_modules: {', '.join(unknown)}: no target module has such a name.")
        if not self._layers_of(adapter_name):
            raise ValueError("All target modules are static_modules: nothing would be routed. Use peft.LoraConfig.")

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
        layer.mixlora_reads_images = self._reads_images(current_key, base)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        join_siblings(layer, parent, target_name)
        self._replace_module(parent, target_name, layer, target)
        self.mixlora_layers.append(layer)

    def _reads_images(self, name: str, layer: nn.Module) -> bool:
        """Whether a layer is beside the decoder and its head, in a model that has anything there."""
        if not self._decoder or name.startswith(f"{self._decoder}."):
            return False
        return layer is not self.model.get_output_embeddings()

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
        """Unload as `BaseTuner.unload`, and remove the hooks that make the routing of every batch."""
        self._passes.remove()
        return super().unload()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete as `BaseTuner.delete_adapter`, and from the state that all layers share."""
        super().delete_adapter(adapter_name)
        for held in (self.mixlora_task, self.mixlora_center):
            if adapter_name in held:
                del held[adapter_name]

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        """Run around `forward` and `generate` of the PeftModel, as `LoraModel`'s. Raises ValueError for what only LoRA
        does there: an adapter for each sample of a batch.
        """
        if adapter_names is not None:
            raise ValueError(
                "adapter_names: all samples of a batch go through one adapter of this kind. Choose it by set_adapter."
            )
        yield

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
        return torch.stack([matrices[layer, name].detach() for layer in self._layers_of(name)])

    def last_labels(self, tasks: Tasks) -> list[str]:
        """The task of every instance of that batch (N), from those of its samples."""
        numbers = self.mixlora_routing.current.numbers_for(self._config(self.active_adapters[0]).route_on)
        return instance_labels(tasks, len(tasks), numbers)


def _taken_off(model: nn.Module) -> bool:
    """Take the layers and hooks of a tuner off a model; whether there were any."""
    passes = Passes.of(model)
    if passes is not None:
        passes.remove()
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear | StaticLinear)]
    for name, layer in layers:
        model.set_submodule(name, layer.base_layer)
    return bool(passes or layers)
