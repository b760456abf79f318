"""Image tokens of Idefics3 and SmolVLM."""

from __future__ import annotations

import math

import torch
from transformers import PretrainedConfig, ProcessorMixin

from .family import TEXT, Family, ImageInput


class Idefics3(Family):
    """Idefics3, SmolVLM: the longest edge is scaled to some tiles, the other to as many as it needs; if they are
    several, one more for all of the image.
    """

    side = 4  # its processors' size["longest_edge"], in tiles

    def smallest(self, config: PretrainedConfig) -> int:
        vision = config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2)

    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> ImageInput:
        side, size = self._side(config, budget), config.vision_config.image_size
        # a mark for a tile, and one for its place
        tile = [TEXT, TEXT, *[config.image_token_id] * self.smallest(config)]
        grid = [*tile * side, TEXT] * side if side > 1 else []  # a row ends with a new line
        count = side**2 + 1 if side > 1 else 1
        tensors = {
            "pixel_values": torch.ones(1, count, 3, size, size),  # the model drops tiles of zeros, as padding
            "pixel_attention_mask": torch.ones(1, count, size, size, dtype=torch.long),
        }
        return ImageInput([*grid, *tile, TEXT], tensors)

    def limit(self, processor: ProcessorMixin | None, config: PretrainedConfig, budget: int) -> None:
        if processor is not None:
            images = processor.image_processor
            most = self._side(config, budget) * images.max_image_size["longest_edge"]
            images.size = {"longest_edge": min(images.size["longest_edge"], most)}

    def _side(self, config: PretrainedConfig, budget: int | None) -> int:
        """Tiles along an edge of a square."""
        if budget is None:
            return self.side
        return max(1, min(self.side, math.isqrt(budget // self.smallest(config) - 1)))
