"""Image tokens of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and those that share their processors."""

from __future__ import annotations

import math

import torch
from transformers import PretrainedConfig, ProcessorMixin

from .family import TEXT, Family, ImageInput


class QwenVL(Family):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL: an image keeps its pixels, up to a number of them.

    An image that is more times as long as wide than the budget has tokens takes more than the budget: a token's height
    is the least (`smart_resize` of transformers).
    """

    kinds = ("mm_token_type_ids",)

    def smallest(self, config: PretrainedConfig) -> int:
        return 4

    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> ImageInput:
        """Without a budget: a square that takes half of the sample."""
        vision = config.vision_config
        square = math.isqrt(tokens // 2)
        height, width = (square, square) if budget is None else _rectangle(budget)
        grid_13 = torch.tensor([[1, height * vision.spatial_merge_size, width * vision.spatial_merge_size]])
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        image = [config.image_token_id] * (height * width)
        return ImageInput(
            [getattr(config, "vision_start_token_id", TEXT), *image, getattr(config, "vision_end_token_id", TEXT)],
            {"pixel_values": torch.empty(int(grid_13.prod()), values), "image_grid_thw": grid_13},
        )

    def limit(self, processor: ProcessorMixin | None, config: PretrainedConfig, budget: int) -> None:
        if processor is None:
            return
        images = processor.image_processor
        most = min(images.size["longest_edge"], budget * (images.patch_size * images.merge_size) ** 2)
        # both are areas; small images are scaled up to the other one and then rounded up
        images.size = {"longest_edge": most, "shortest_edge": min(images.size["shortest_edge"], most // 4)}


def _rectangle(most: int) -> tuple[int, int]:
    """(height, width) of the largest rectangle of at most that many tokens, near a square where there are several."""
    root = math.isqrt(most)
    return max(((low, most // low) for low in range(root, root // 2, -1)), key=lambda shape: shape[0] * shape[1])
