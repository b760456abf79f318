"""Image tokens of Gemma 3."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from .family import TEXT, Family, ImageInput


class Gemma3(Family):
    """Gemma 3: every image is scaled to one size; image tokens attend to each other in both directions."""

    kinds = ("token_type_ids",)

    def smallest(self, config: PretrainedConfig) -> int:
        return int(config.mm_tokens_per_image)

    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> ImageInput:
        size, image = config.vision_config.image_size, [config.image_token_id] * config.mm_tokens_per_image
        ids_L = [TEXT, config.boi_token_id, *image, config.eoi_token_id, TEXT]  # empty lines before and after
        return ImageInput(ids_L, {"pixel_values": torch.empty(1, 3, size, size)})
