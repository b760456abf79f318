"""The families of models, and what one picture is in each: its tokens, its tensors, and how to keep it small.

What can be read off a model's config is. Shapes: L tokens of a picture with its marks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig, ProcessorMixin

from . import llava_onevision as anyres

TEXT = 1  # a token that stands for any text


@dataclass(frozen=True)
class Picture:
    """One picture as the processor gives it: L token ids, and its tensors, of which a batch is the concatenation."""

    ids_L: list[int]
    tensors: dict[str, Tensor]


class Family(ABC):
    """The facts of one family. `kinds` names the processor's tensor with 1 where an image token is, if it gives one."""

    kinds: str | None = None

    @abstractmethod
    def smallest(self, config: PretrainedConfig) -> int:
        """The least `max_image_tokens` that this model's pictures can keep to."""

    @abstractmethod
    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> Picture:
        """The picture with the most image tokens: within the budget, or by the processor's default without one."""

    def limit(self, processor: ProcessorMixin | None, config: PretrainedConfig, budget: int) -> None:
        """Set the processor (and the config, where the model reads it there) so that no picture is over the budget.

        Pictures of one size are as small as they can be.
        """
        return


class Llava(Family):
    """LLaVA-1.5: every picture is scaled to one size."""

    def smallest(self, config: PretrainedConfig) -> int:
        vision = config.vision_config
        of_class = vision.model_type == "clip_vision_model"  # CLIP's class token comes first
        without_first = config.vision_feature_select_strategy == "default"
        return int((vision.image_size // vision.patch_size) ** 2 + of_class - without_first)

    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> Picture:
        size = config.vision_config.image_size
        return Picture([config.image_token_id] * self.smallest(config), {"pixel_values": torch.empty(1, 3, size, size)})


class Gemma3(Family):
    """Gemma 3: every picture is scaled to one size; image tokens attend to each other in both directions."""

    kinds = "token_type_ids"

    def smallest(self, config: PretrainedConfig) -> int:
        return int(config.mm_tokens_per_image)

    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> Picture:
        size, image = config.vision_config.image_size, [config.image_token_id] * config.mm_tokens_per_image
        ids_L = [TEXT, config.boi_token_id, *image, config.eoi_token_id, TEXT]  # empty lines before and after
        return Picture(ids_L, {"pixel_values": torch.empty(1, 3, size, size)})


class QwenVL(Family):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL: a picture keeps its pixels, up to a number of them.

    A picture that is more times as long as wide than the budget has tokens takes more than the budget: a token's height
    is the least (`smart_resize` of transformers).
    """

    kinds = "mm_token_type_ids"

    def smallest(self, config: PretrainedConfig) -> int:
        return 4

    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> Picture:
        """Without a budget: a square that takes half of the sample."""
        vision = config.vision_config
        square = math.isqrt(tokens // 2)
        height, width = (square, square) if budget is None else _rectangle(budget)
        grid_13 = torch.tensor([[1, height * vision.spatial_merge_size, width * vision.spatial_merge_size]])
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        image = [config.image_token_id] * (height * width)
        return Picture(
            [config.vision_start_token_id, *image, config.vision_end_token_id],
            {"pixel_values": torch.empty(int(grid_13.prod()), values), "image_grid_thw": grid_13},
        )

    def limit(self, processor: ProcessorMixin | None, config: PretrainedConfig, budget: int) -> None:
        if processor is None:
            return
        images = processor.image_processor
        most = min(images.size["longest_edge"], budget * (images.patch_size * images.merge_size) ** 2)
        # both are areas; small pictures are scaled up to the other one and then rounded up
        images.size = {"longest_edge": most, "shortest_edge": min(images.size["shortest_edge"], most // 4)}


class InternVL(Family):
    """InternVL 3: tiles in the shape that fits the picture best; if they are several, one more for all of it."""

    tiles = 12  # its processors' `max_patches`

    def smallest(self, config: PretrainedConfig) -> int:
        return int(config.image_seq_length)

    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> Picture:
        tiles = self._tiles(config, budget)
        count = tiles + 1 if tiles > 1 else 1
        image = [config.image_token_id] * (count * config.image_seq_length)
        height, width = config.vision_config.image_size
        return Picture([TEXT, *image, TEXT], {"pixel_values": torch.empty(count, 3, height, width)})

    def limit(self, processor: ProcessorMixin | None, config: PretrainedConfig, budget: int) -> None:
        if processor is not None:
            images = processor.image_processor
            images.max_patches = min(images.max_patches, self._tiles(config, budget))

    def _tiles(self, config: PretrainedConfig, budget: int | None) -> int:
        if budget is None:
            return self.tiles
        return max(1, min(self.tiles, budget // self.smallest(config) - 1))


class Idefics3(Family):
    """Idefics3, SmolVLM: the longest edge is scaled to some tiles, the other to as many as it needs; if they are
    several, one more for all of the picture.
    """

    side = 4  # its processors' size["longest_edge"], in tiles

    def smallest(self, config: PretrainedConfig) -> int:
        vision = config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2)

    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> Picture:
        side, size = self._side(config, budget), config.vision_config.image_size
        tile = [
            TEXT,
            TEXT,
            *[config.image_token_id] * self.smallest(config),
        ]  # a mark for a tile, and one for its place
        grid = [*tile * side, TEXT] * side if side > 1 else []  # a row ends with a new line
        count = side**2 + 1 if side > 1 else 1
        tensors = {
            "pixel_values": torch.ones(1, count, 3, size, size),  # the model drops tiles of zeros, as padding
            "pixel_attention_mask": torch.ones(1, count, size, size, dtype=torch.long),
        }
        return Picture([*grid, *tile, TEXT], tensors)

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


class LlavaOneVision(Family):
    """LLaVA-OneVision: tiles in the shape of the picture. The model works out their number again, from its config."""

    def smallest(self, config: PretrainedConfig) -> int:
        return anyres.smallest(config)

    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> Picture:
        pinpoints = config.image_grid_pinpoints if budget is None else anyres.within(config, budget)
        count, tiles, size = anyres.largest(config, pinpoints)
        edge = config.vision_config.image_size
        tensors = {
            "pixel_values": torch.empty(1, tiles, 3, edge, edge),
            "image_sizes": torch.tensor([size]),
            "batch_num_images": torch.ones(1, dtype=torch.long),
        }
        return Picture([config.image_token_id] * count, tensors)

    def limit(self, processor: ProcessorMixin | None, config: PretrainedConfig, budget: int) -> None:
        config.image_grid_pinpoints = anyres.within(config, budget)
        if processor is not None:
            processor.image_processor.image_grid_pinpoints = config.image_grid_pinpoints


FAMILIES: dict[str, Family] = {  # by the config's model_type
    "llava": Llava(),
    "llava_onevision": LlavaOneVision(),
    "qwen2_vl": QwenVL(),
    "qwen2_5_vl": QwenVL(),
    "qwen3_vl": QwenVL(),
    "gemma3": Gemma3(),
    "internvl": InternVL(),
    "idefics3": Idefics3(),
    "smolvlm": Idefics3(),
}


def _rectangle(most: int) -> tuple[int, int]:
    """(height, width) of the largest rectangle of at most that many tokens, near a square where there are several."""
    root = math.isqrt(most)
    return max(((low, most // low) for low in range(root, root // 2, -1)), key=lambda shape: shape[0] * shape[1])
