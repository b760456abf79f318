"""transformers' NF4 loading for what it does not do itself. Weights that do not all end on the device: each is
quantised there, one at a time, and the packed bytes of some go back to the host at once. And experts that are one
parameter.

transformers itself puts everything on one device, or refuses ("some modules are dispatched on the CPU"). It lets others
register a quantiser of their own, and reads tensors one by one for any that quantises while loading (5.23,
`convert_and_load_state_dict_in_model`).
"""

from __future__ import annotations

import mmap
from typing import Any

import torch
from bitsandbytes.nn.modules import Params4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from .experts import NF4Experts, put_experts, quantised_experts
from .nf4 import with_bytes

METHOD = "qmixlora_placed_nf4"


class LoadingOutOfMemory(BaseException):
    """Memory ran out while a weight was placed. (No Exception, so that transformers' loader lets it through.)"""


@register_quantization_config(METHOD)
class PlacedConfig(BitsAndBytesConfig):
    """`plain`, with the device that quantises, the parameters whose packed bytes return to the host, and those that
    are experts.

    Where something is to lie on the host, the model is loaded with `device_map={"": "cpu"}`: what is not quantised
    stays there.
    """

    def __init__(
        self, plain: BitsAndBytesConfig, device: torch.device, to_host: frozenset[str], experts: frozenset[str]
    ) -> None:
        self.__dict__.update(plain.__dict__)
        self.quant_method = METHOD  # type: ignore[assignment]  # others' methods are no members of the enum
        self.plain, self.device, self.to_host, self.experts = plain, device, to_host, experts


@register_quantizer(METHOD)
class PlacedQuantizer(Bnb4BitHfQuantizer):
    """transformers' quantiser for 4 bits, for experts too, with another place for its results."""

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        experts: frozenset[str] = self.quantization_config.experts  # type: ignore[attr-defined]
        return param_name in experts or super().param_needs_quantization(model, param_name, **kwargs)

    def _process_model_before_weight_loading(  # type: ignore[override]  # as its parent's
        self, model: PreTrainedModel, device_map: Any, **kwargs: Any
    ) -> None:
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        experts: frozenset[str] = self.quantization_config.experts  # type: ignore[attr-defined]
        self.shapes = {name: model.get_parameter(name).shape for name in experts}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, shape in self.shapes.items():
            weight = model.get_parameter(name)
            if isinstance(weight, Params4bit):  # else it was not in the checkpoint, and a check says so
                put_experts(model, name, NF4Experts(weight, shape))
        super()._process_model_after_weight_loading(model, **kwargs)
        return model

    def get_quantize_ops(self) -> Bnb4bitQuantize:
        return _QuantizeAndPlace(self)


class _QuantizeAndPlace(Bnb4bitQuantize):
    def convert(  # type: ignore[override]  # as its parent's, which differs from its own parent's
        self,
        input_dict: dict[str, list[Tensor]],
        full_layer_name: str | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        try:
            return self._placed(input_dict, full_layer_name, model)
        except torch.OutOfMemoryError as error:  # transformers notes any Exception, goes on, and raises another one
            raise LoadingOutOfMemory(str(error)) from None

    def _placed(
        self, input_dict: dict[str, list[Tensor]], full_layer_name: str | None, model: nn.Module | None
    ) -> dict[str, Tensor]:
        config = self.hf_quantizer.quantization_config
        there = {}
        for name, value in input_dict.items():
            there[name] = [(value[0] if isinstance(value, list) else value).to(config.device)]
        experts = {name: quantised_experts(there.pop(name)[0]) for name in [*there] if name in config.experts}
        placed: dict[str, Tensor] = super().convert(there, full_layer_name=full_layer_name, model=model)
        placed.update(experts)
        for name, weight in placed.items():
            if name in config.to_host:
                placed[name] = with_bytes(weight, _to_host(weight.data))
        return placed


def _to_host(packed: Tensor) -> Tensor:
    """Copy bytes to host memory that goes back to the system when it is freed, which is soon: `stream_layers` copies it
    on. (A heap may keep memory that is freed amid other blocks.)
    """
    memory = mmap.mmap(-1, packed.nbytes)
    return torch.frombuffer(memory, dtype=packed.dtype).view(packed.shape).copy_(packed)


def as_plain(model: PreTrainedModel) -> None:
    """Have a model that was loaded with a `PlacedConfig` say that bitsandbytes quantised it, as others ask for."""
    quantizer: Any = model.hf_quantizer
    plain = model.config.quantization_config.plain
    model.config.quantization_config = quantizer.quantization_config = plain
    model.quantization_method = plain.quant_method
