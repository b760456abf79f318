"""Cohere Compass: Qwen3-VL's tower under Cohere's decoder."""

from transformers import CohereCompassProcessor, Qwen2VLImageProcessor, Qwen3VLVideoProcessor

from tests.families.variant import ROPE, Made, Variant, config_of, template, text

from . import qwen3_vl

MARKS = ("<|IMAGE_PAD|>", "<|VIDEO_PAD|>", "<|VISION_START|>", "<|VISION_END|>")
LAYERS = ["sliding_attention", "full_attention"]


def make(tokens) -> Made:
    ids = tokens.convert_tokens_to_ids
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = config_of(
        "cohere_compass", tokens,
        text_config=text(layer_types=LAYERS, rope_parameters=dict.fromkeys(LAYERS, ROPE)),
        vision_config={**qwen3_vl.VISION, "deepstack_visual_indexes": [0]},
        **{name: ids(mark) for name, mark in zip(names, MARKS, strict=True)},
    )  # fmt: skip
    return config, CohereCompassProcessor(
        Qwen2VLImageProcessor(patch_size=16), tokens, Qwen3VLVideoProcessor(patch_size=16)
    )


VARIANT = Variant(
    make, template("<|VISION_START|><|IMAGE_PAD|><|VISION_END|>", "<|USER|>", "<|CHATBOT|>", "<eos>"),
    marks=(*MARKS, "<|USER|>", "<|CHATBOT|>"),
)  # fmt: skip
