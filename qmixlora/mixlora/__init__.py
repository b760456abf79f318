"""Conditional Mixture-of-LoRA (arXiv 2402.15896) as a PEFT method; importing this registers it with PEFT."""

from typing import cast

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

from .config import FORMAT, PEFT_PREFIX, PEFT_TYPE, MixLoraConfig
from .inputs import IGNORED, prompt_mask
from .layer import MixLoraLayer
from .model import MixLoraModel
from .routing import device_of, is_adapter_parameter, routed_as
from .running_means import sums_of_step
from .static import StaticLinear

# `peft.utils.register_peft_method` refuses names outside PEFT's enum; the enum is a str, so a plain string is a key.
KEY = cast(PeftType, PEFT_TYPE)
PEFT_TYPE_TO_CONFIG_MAPPING[KEY] = MixLoraConfig
PEFT_TYPE_TO_TUNER_MAPPING[KEY] = MixLoraModel
PEFT_TYPE_TO_PREFIX_MAPPING[KEY] = MixLoraModel.prefix

__all__ = [
    "FORMAT",
    "IGNORED",
    "PEFT_PREFIX",
    "PEFT_TYPE",
    "MixLoraConfig",
    "MixLoraLayer",
    "MixLoraModel",
    "StaticLinear",
    "device_of",
    "is_adapter_parameter",
    "prompt_mask",
    "routed_as",
    "sums_of_step",
]
