"""Image tokens of LLaVA-1.5, and whether a processor of its kind counts them as the model does."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import PretrainedConfig, ProcessorMixin

from qmixlora.errors import UserError

from .family import Family, ImageInput

STRATEGY = "vision_feature_select_strategy"
FRAMES = ("llava", "llava_next", "llava_next_video", "video_llava")  # whose processors count patches of one tower
FIRST = {"clip_vision_model": 1, "siglip_vision_model": 0}  # tokens that a tower puts before those of its patches


class Llava(Family):
    """LLaVA-1.5: every image is scaled to one size."""

    def smallest(self, config: PretrainedConfig) -> int:
        vision = config.vision_config
        of_class = vision.model_type == "clip_vision_model"  # CLIP's class token comes first
        without_first = config.vision_feature_select_strategy == "default"
        return int((vision.image_size // vision.patch_size) ** 2 + of_class - without_first)

    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> ImageInput:
        size = config.vision_config.image_size
        return ImageInput(
            [config.image_token_id] * self.smallest(config), {"pixel_values": torch.empty(1, 3, size, size)}
        )


def check_counting(processor: ProcessorMixin, config: PretrainedConfig, where: str) -> None:
    """Raise UserError where a processor of LLaVA's kind would give an image another number of tokens than the model has
    features: its settings are copies of the model's, which early checkpoints lack. `where` is the checkpoint.
    """
    tower: Any = getattr(config, "vision_config", None)
    first = FIRST.get(getattr(tower, "model_type", ""))
    strategy = getattr(config, STRATEGY, None)
    if config.model_type not in FRAMES or first is None or strategy is None:
        return
    given = {name: getattr(processor, name, None) for name in ("patch_size", "num_additional_image_tokens", STRATEGY)}
    patch, additional, own = given.values()
    beside = (additional or 0) - (own == "default")  # tokens beside those of the patches
    if patch == tower.patch_size and beside == first - (strategy == "default"):
        return
    right = dict(zip(given, (tower.patch_size, first, strategy), strict=True))
    told, fix = (", ".join(f'"{name}": {json.dumps(value)}' for name, value in own.items()) for own in (given, right))
    raise UserError(
        f"The model's processor gives an image another number of tokens than the model has features of it ({told}).",
        where=f"{where}: processor_config.json",
        fix=f"Write {fix} there.",
    )
