"""What one picture is in a batch, by family: how many tokens, and which tensors come with it.

Shapes: B batch, P patches of a picture.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from qmixlora.errors import UserError

QWEN_VL = ("qwen2_5_vl", "qwen2_vl")


def picture(config: PretrainedConfig, tokens: int, rows: int) -> tuple[int, int, dict[str, Any]]:
    """(id of the picture's tokens, their number, tensors for `rows` pictures) in samples of `tokens`.

    LLaVA-1.5 scales every picture to one size. Qwen-VL keeps its pixels, so that its number of tokens is a choice: here
    a square picture that takes half of the sample.

    Raises:
        UserError: the family cannot be planned yet.
    """
    vision = config.vision_config
    if config.model_type == "llava":
        size = vision.image_size
        return config.image_token_index, (size // vision.patch_size) ** 2, {
            "pixel_values": torch.empty(rows, 3, size, size)
        }  # fmt: skip
    if config.model_type in QWEN_VL:
        side = math.isqrt(tokens // 2)
        edge = side * vision.spatial_merge_size
        values = 3 * vision.temporal_patch_size * vision.patch_size**2
        grid_B3 = torch.tensor([[1, edge, edge]] * rows)
        return config.image_token_id, side * side, {
            "pixel_values": torch.empty(rows * edge * edge, values),
            "image_grid_thw": grid_B3,
        }  # fmt: skip
    raise UserError(
        f"Pictures of {config.model_type!r} models cannot be planned yet.",
        where="model.id",
        fix=f"Plan one of: llava, {', '.join(QWEN_VL)}.",
    )


def kinds_of_tokens(config: PretrainedConfig, ids_BS: Tensor, image_id: int) -> dict[str, Tensor]:
    """What Qwen-VL's processors say of every token beside its id: 1 where it stands for a picture."""
    return {"mm_token_type_ids": (ids_BS == image_id).long()} if config.model_type in QWEN_VL else {}
