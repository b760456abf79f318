"""Recipes to plan, and a small model with images of any size."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING

from qmixlora.recipe import Recipe, edited

LLAVA_7B, LLAVA_13B = "llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"
QWEN_7B = "Qwen/Qwen2.5-VL-7B-Instruct"


def recipe_of(model: str, adapter: dict[str, Any] | None = None, **train: Any) -> Recipe:
    values = {"model": {"id": model}, "adapter": adapter or {}, "data": {"train": "-"}, "train": train}
    return Recipe.model_validate(values)


def in_fp32(recipe: Recipe, *overrides: str) -> Recipe:
    """bitsandbytes' bf16 kernels are slow on a CPU."""
    return edited(recipe, ["model.dtype=float32", *overrides])


def small_qwen(layers: int) -> Any:
    return CONFIG_MAPPING["qwen2_5_vl"](
        text_config={
            "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": layers, "num_attention_heads": 8,
            "num_key_value_heads": 2, "vocab_size": 500,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 256,
            "fullatt_block_indexes": [1],
        },
        image_token_id=499, video_token_id=498, vision_start_token_id=497, vision_end_token_id=496,
    )  # fmt: skip


def small_gemma_4() -> Any:
    """With inputs of its own for every layer."""
    return CONFIG_MAPPING["gemma4"](
        text_config={
            "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 64, "global_head_dim": 64, "vocab_size": 20_000,
            "vocab_size_per_layer_input": 20_000, "hidden_size_per_layer_input": 64, "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
        vision_config={
            "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 4, "head_dim": 32, "default_output_length": 64,
        },
        audio_config=None, image_token_id=499, video_token_id=498, boi_token_id=497, eoi_token_id=496,
    )  # fmt: skip
