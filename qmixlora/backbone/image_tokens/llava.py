"""Image tokens of LLaVA-1.5."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from .family import Family, ImageInput


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
