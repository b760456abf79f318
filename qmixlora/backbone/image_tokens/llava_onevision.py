"""Image tokens of LLaVA-OneVision, whose tiles follow the image's shape.

The image is fitted into one of the sizes in `image_grid_pinpoints` (a whole number of tiles, `anyres`), and the
features of the padding are dropped again. An image over `anyres_max_N` tiles by more than a tenth is scaled down to N.
A feature for a new line ends each row, and the features of the whole image, as one tile, come first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from transformers import PretrainedConfig, ProcessorMixin
from transformers.image_processing_utils import select_best_resolution

from .family import Family, ImageInput

Size = tuple[int, int]  # height, width


class LlavaOneVision(Family):
    """LLaVA-OneVision: tiles in the shape of the image. The model works out their number again, from its config."""

    def smallest(self, config: PretrainedConfig) -> int:
        return _smallest(config)

    def largest(self, config: PretrainedConfig, budget: int | None, tokens: int) -> ImageInput:
        pinpoints = config.image_grid_pinpoints if budget is None else _within(config, budget)
        count, tiles, size = _largest(config, pinpoints)
        edge = config.vision_config.image_size
        tensors = {
            "pixel_values": torch.empty(1, tiles, 3, edge, edge),
            "image_sizes": torch.tensor([size]),
            "batch_num_images": torch.ones(1, dtype=torch.long),
        }
        return ImageInput([config.image_token_id] * count, tensors)

    def limit(self, processor: ProcessorMixin | None, config: PretrainedConfig, budget: int) -> None:
        config.image_grid_pinpoints = _within(config, budget)
        if processor is not None:
            processor.image_processor.image_grid_pinpoints = config.image_grid_pinpoints


def _features(config: PretrainedConfig, rows: int, columns: int) -> int:
    """Features of an image whose padding is off, `rows` x `columns` features large.

    Source: `pack_image_features` of transformers' LlavaOnevisionModel.
    """
    side = _side(config)
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(rows * columns / (most * side**2))
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return side**2 + rows * (columns + 1)


def _within(config: PretrainedConfig, budget: int) -> list[list[int]]:
    """The config's sizes in which no image takes more than `budget` features, whatever its shape."""
    return [
        list(pinpoint)
        for pinpoint in config.image_grid_pinpoints
        if max(_features(config, *shape) for shape, _ in _shapes(config, pinpoint, pinpoint)) <= budget
    ]


def _smallest(config: PretrainedConfig) -> int:
    """The least budget that leaves a size to fit images into."""
    return min(
        max(_features(config, *shape) for shape, _ in _shapes(config, pinpoint, pinpoint))
        for pinpoint in config.image_grid_pinpoints
    )


def _largest(config: PretrainedConfig, pinpoints: list[list[int]]) -> tuple[int, int, Size]:
    """(features, tiles, image's size in pixels) of the image with the most features, fitted into these sizes."""
    tile = config.vision_config.image_size
    shapes = [
        (_features(config, *shape), best, size)
        for pinpoint in pinpoints
        # an image that leaves a whole row or column of tiles empty is fitted into another size
        for shape, size in _shapes(config, pinpoint, (tile, tile))
        if list(best := select_best_resolution(size, pinpoints)) == list(pinpoint)
    ]
    count, (height, width), size = max(shapes)
    return count, 1 + (height // tile) * (width // tile), size


def _shapes(config: PretrainedConfig, pinpoint: list[int], most: list[int] | Size) -> Iterator[tuple[Size, Size]]:
    """(rows and columns of features, size in pixels) of images that fill a size in one direction.

    In the other one, up to `most` pixels are padding, which comes off in pairs of features.
    """
    height, width = pinpoint
    tile, side = config.vision_config.image_size, _side(config)
    rows, columns = height * side // tile, width * side // tile
    for off in range(0, min(most[1] * side // tile, columns), 2):
        yield (rows, columns - off), (height, math.ceil((columns - off) * tile / side))
    for off in range(2, min(most[0] * side // tile, rows), 2):
        yield (rows - off, columns), (math.ceil((rows - off) * tile / side), width)


def _side(config: PretrainedConfig) -> int:
    """Features along a tile."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)
