"""Image tokens of InternVL 3."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, ProcessorMixin

from .family import TEXT, Family, ImageInput


class InternVL(Family):
    """InternVL 3: tiles in the shape that fits the image best; if they are several, one more for all of it."""

    tiles = 12  # its processors' `max_patches`

    def smallest(self, config: PretrainedConfig) -> int:
        return int(config.image_seq_length)

    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> ImageInput:
        tiles = self._tiles(config, budget)
        count = tiles + 1 if tiles > 1 else 1
        image = [config.image_token_id] * (count * config.image_seq_length)
        height, width = config.vision_config.image_size
        return ImageInput([TEXT, *image, TEXT], {"pixel_values": torch.empty(count, 3, height, width)})

    def limit(self, processor: ProcessorMixin | None, config: PretrainedConfig, budget: int) -> None:
        if processor is not None:
            images = processor.image_processor
            images.max_patches = min(images.max_patches, self._tiles(config, budget))

    def _tiles(self, config: PretrainedConfig, budget: int | None) -> int:
        if budget is None:
            return self.tiles
        return max(1, min(self.tiles, budget // self.smallest(config) - 1))
