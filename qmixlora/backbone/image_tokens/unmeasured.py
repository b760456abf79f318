"""The largest image of families that are measured with their processor, for plans before there is one here: by the
defaults of their processor classes (transformers 5.23), which a checkpoint may change.

Shapes: L tokens of an image with its marks, N patches, T tiles.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from transformers import PretrainedConfig

from .family import TEXT, Family, ImageInput
from .qwen_vl import QwenVL

# Gemma 4's budgets: rows and columns of tokens
STEPS = {70: (7, 10), 140: (10, 14), 280: (14, 20), 560: (20, 28), 1120: (28, 40)}


class PaddleOcrVL(QwenVL):
    """Qwen's grids, of single images."""

    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> ImageInput:
        vision = config.vision_config
        side = math.isqrt(tokens // 2 if budget is None else budget)
        grid_13 = torch.tensor([[1, side * vision.spatial_merge_size, side * vision.spatial_merge_size]])
        pixels = torch.empty(int(grid_13.prod()), vision.num_channels, vision.patch_size, vision.patch_size)
        ids_L = [TEXT, *[config.image_token_id] * side**2, TEXT]
        return ImageInput(ids_L, {"pixel_values": pixels, "image_grid_thw": grid_13})


class Pixtral(Family):
    """Any shape, a break after every row."""

    def smallest(self, config: PretrainedConfig) -> int:
        return 1

    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> ImageInput:
        vision = config.vision_config
        pixels = vision.patch_size * getattr(config, "spatial_merge_size", 1)  # of a token's edge
        side = vision.image_size // pixels
        side = side if budget is None else min(side, math.isqrt(budget))
        ids_L = [*[config.image_token_index] * side, TEXT] * side
        edge = side * pixels
        tensors = {"pixel_values": torch.empty(1, 3, edge, edge), "image_sizes": torch.tensor([[edge, edge]])}
        return ImageInput(ids_L, tensors)


class Gemma4(Family):
    """As many patches as a budget of a few steps allows, nine of them to a token; 280 tokens unless it is said."""

    kinds = ("mm_token_type_ids",)

    def smallest(self, config: PretrainedConfig) -> int:
        return min(STEPS)

    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> ImageInput:
        vision = config.vision_config
        rows, columns = STEPS[max(step for step in STEPS if step <= min(budget or 280, 280))]
        across, down = torch.meshgrid(
            torch.arange(columns * vision.pooling_kernel_size), torch.arange(rows * vision.pooling_kernel_size),
            indexing="xy",
        )  # fmt: skip
        positions_1N2 = torch.stack([across.flatten(), down.flatten()], dim=-1)[None]
        patches = torch.empty(1, positions_1N2.shape[1], 3 * vision.patch_size**2)
        ids_L = [config.boi_token_id, *[config.image_token_id] * (rows * columns), TEXT]
        return ImageInput(ids_L, {"pixel_values": patches, "image_position_ids": positions_1N2})


class LlavaNext(Family):
    """An overview and tiles, with a break after every row of these."""

    def smallest(self, config: PretrainedConfig) -> int:
        return min(self._count(config, pinpoint) for pinpoint in config.image_grid_pinpoints)

    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> ImageInput:
        within = [p for p in config.image_grid_pinpoints if budget is None or self._count(config, p) <= budget]
        height, width = max(within, key=lambda pinpoint: self._count(config, pinpoint))
        edge = config.vision_config.image_size
        tiles = 1 + (height // edge) * (width // edge)
        tensors = {
            "pixel_values": torch.empty(1, tiles, 3, edge, edge),
            "image_sizes": torch.tensor([[height, width]]),
        }
        return ImageInput([config.image_token_index] * self._count(config, [height, width]), tensors)

    def _count(self, config: PretrainedConfig, pinpoint: list[int]) -> int:
        patch, edge = config.vision_config.patch_size, config.vision_config.image_size
        return int((edge // patch) ** 2 + (pinpoint[0] // patch) * (pinpoint[1] // patch + 1))


class Tiled(Family):
    """An overview and two to `most` tiles of `edge` pixels, of as many tokens each; or, within a budget, the overview
    alone.
    """

    edge: int
    most: int

    def smallest(self, config: PretrainedConfig) -> int:
        return self.of_a_tile(config)

    @abstractmethod
    def of_a_tile(self, config: PretrainedConfig) -> int:
        """The tokens of a tile."""

    def side(self, config: PretrainedConfig) -> int:
        """The patches along a tile's edge."""
        return int(self.edge // config.vision_config.patch_size)

    def tiles(self, config: PretrainedConfig, budget: int | None) -> int:
        """How many of them the largest image has, with the overview."""
        tiles = self.most + 1 if budget is None else min(self.most + 1, budget // self.of_a_tile(config))
        return tiles if tiles > 2 else 1


class Lfm2VL(Tiled):
    """Ten tiles of 512 pixels."""

    edge, most = 512, 10

    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> ImageInput:
        tiles, side, vision = self.tiles(config, budget), self.side(config), config.vision_config
        tensors = {
            "pixel_values": torch.empty(tiles, side**2, vision.num_channels * vision.patch_size**2),
            "pixel_attention_mask": torch.ones(tiles, side**2, dtype=torch.int32),
            "spatial_shapes": torch.full((tiles, 2), side),
        }
        return ImageInput([*[config.image_token_id] * self.of_a_tile(config), TEXT] * tiles, tensors)

    def of_a_tile(self, config: PretrainedConfig) -> int:
        return int((self.side(config) // config.downsample_factor) ** 2)


class MiniCPMV(Tiled):
    """Nine slices of 448 pixels, packed in one row."""

    edge, most = 448, 9

    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> ImageInput:
        slices, side, patch = self.tiles(config, budget), self.side(config), config.vision_config.patch_size
        tensors = {
            "pixel_values": torch.empty(1, 3, patch, slices * side**2 * patch),
            "target_sizes": torch.full((slices, 2), side),
        }
        ids_L = [*[TEXT] * 3, *[TEXT, *[config.image_token_id] * self.of_a_tile(config), TEXT] * slices]
        return ImageInput(ids_L, tensors, along={"pixel_values": 3})

    def of_a_tile(self, config: PretrainedConfig) -> int:
        return int(self.side(config) ** 2 // (4 if config.downsample_mode == "4x" else 16))


class Mllama(Family):
    """Tiles in the shape of the image, read through cross-attention: one token stands for them all."""

    def smallest(self, config: PretrainedConfig) -> int:
        return 1

    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> ImageInput:
        vision = config.vision_config
        tiles, edge = vision.max_num_tiles, vision.image_size
        tensors = {
            "pixel_values": torch.empty(1, 1, tiles, 3, edge, edge),
            "aspect_ratio_ids": torch.tensor([[vision.max_aspect_ratio_id]]),
            "aspect_ratio_mask": torch.ones(1, 1, tiles, dtype=torch.long),
            "cross_attention_mask": torch.ones(1, tokens, 1, tiles, dtype=torch.long),
        }
        return ImageInput([config.image_token_index], tensors)


UNMEASURED: dict[str, Family] = {
    "gemma4": Gemma4(),
    "glm4v": QwenVL(),
    "glm46v": QwenVL(),
    "glm4v_moe": QwenVL(),
    "lfm2_vl": Lfm2VL(),
    "llava_next": LlavaNext(),
    "minicpmv4_6": MiniCPMV(),
    "mllama": Mllama(),
    "paddleocr_vl": PaddleOcrVL(),
    "pixtral": Pixtral(),
}
