"""How many features a picture takes in LLaVA-OneVision, whose tiles follow the picture's shape.

The picture is fitted into one of the sizes in `image_grid_pinpoints` (a whole number of tiles, `anyres`), and the
features of the padding are dropped again. What is over `anyres_max_N` tiles by more than a tenth is scaled down to N.
A feature for a new line ends each row, and the features of the whole picture, as one tile, come first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from transformers import PretrainedConfig
from transformers.image_processing_utils import select_best_resolution

Size = tuple[int, int]  # height, width


def features(config: PretrainedConfig, rows: int, columns: int) -> int:
    """Features of a picture whose padding is off, `rows` x `columns` features large.

    Source: `pack_image_features` of transformers' LlavaOnevisionModel.
    """
    side = _side(config)
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(rows * columns / (most * side**2))
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return side**2 + rows * (columns + 1)


def within(config: PretrainedConfig, budget: int) -> list[list[int]]:
    """Those of the config's sizes in which no picture, of whatever shape, takes more than `budget` features."""
    return [
        list(pinpoint)
        for pinpoint in config.image_grid_pinpoints
        if max(features(config, *shape) for shape, _ in _shapes(config, pinpoint, pinpoint)) <= budget
    ]


def smallest(config: PretrainedConfig) -> int:
    """The least budget that leaves a size to fit pictures into."""
    return min(
        max(features(config, *shape) for shape, _ in _shapes(config, pinpoint, pinpoint))
        for pinpoint in config.image_grid_pinpoints
    )


def largest(config: PretrainedConfig, pinpoints: list[list[int]]) -> tuple[int, int, Size]:
    """(features, tiles, picture's size in pixels) of the picture with the most features, fitted into these sizes."""
    tile = config.vision_config.image_size
    found = [
        (features(config, *shape), best, size)
        for pinpoint in pinpoints
        # a picture that leaves a whole row or column of tiles empty is fitted into another size
        for shape, size in _shapes(config, pinpoint, (tile, tile))
        if list(best := select_best_resolution(size, pinpoints)) == list(pinpoint)
    ]
    count, (height, width), size = max(found)
    return count, 1 + (height // tile) * (width // tile), size


def _shapes(config: PretrainedConfig, pinpoint: list[int], most: list[int] | Size) -> Iterator[tuple[Size, Size]]:
    """(rows and columns of features, size in pixels) of pictures that fill a size in one direction.

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
