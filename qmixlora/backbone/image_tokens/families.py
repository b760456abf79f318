"""The families that are known, by the `model_type` of a config."""

from __future__ import annotations

from transformers import PretrainedConfig, ProcessorMixin

from qmixlora.errors import UserError

from .family import Family
from .gemma3 import Gemma3
from .idefics3 import Idefics3
from .internvl import InternVL
from .llava import Llava
from .llava_onevision import LlavaOneVision
from .measured import Measured
from .qwen_vl import QwenVL
from .unmeasured import UNMEASURED

FAMILIES: dict[str, Family] = {
    "llava": Llava(),
    "llava_onevision": LlavaOneVision(),
    "qwen2_vl": QwenVL(),
    "qwen2_5_vl": QwenVL(),
    "qwen3_vl": QwenVL(),
    "qwen3_vl_moe": QwenVL(),
    "qwen3_5": QwenVL(),
    "qwen3_5_moe": QwenVL(),
    "exaone4_5": QwenVL(),
    "gemma3": Gemma3(),
    "internvl": InternVL(),
    "idefics3": Idefics3(),
    "smolvlm": Idefics3(),
}


def is_measured(config: PretrainedConfig) -> bool:
    """Whether a family's images are measured with its processor, where there is one."""
    return _kind(config) not in FAMILIES


def _kind(config: PretrainedConfig) -> str:
    tower = getattr(getattr(config, "vision_config", None), "model_type", "")
    return tower if tower == "pixtral" else config.model_type  # in LLaVA's frame, but with images of any size


def family_of(
    config: PretrainedConfig, where: str, budget: int | None, processor: ProcessorMixin | None = None
) -> Family:
    """The family of a model, whose images can keep to the budget; one that is not known is measured with its processor.

    Raises:
        UserError: the family is not known, or its images cannot be that small; `where` is the key of the recipe.
    """
    kind = _kind(config)
    family = FAMILIES.get(kind) or (UNMEASURED.get(kind) if processor is None else Measured(processor))
    if family is None:
        raise UserError(
            f"The number of tokens that images of {kind!r} models take is not known.",
            where=where,
            fix=f"Known without a processor are: {', '.join([*FAMILIES, *UNMEASURED])}. Of others, name a folder with "
            "the processor.",
        )
    if budget is not None and budget < (smallest := family.smallest(config)):
        raise UserError(
            f"An image takes at least {smallest} tokens in this model; it cannot be held to {budget}.",
            where="data.max_image_tokens",
            fix=f"Set it to {smallest} or more, or leave it out.",
        )
    return family
