"""Qwen3-VL: features for several layers (deepstack)."""

from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

from tests.families.variant import ROPE, Made, Variant, config_of, text

from . import qwen2_vl

VISION = {
    "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 64, "patch_size": 16,
}  # fmt: skip


def make(tokens, kind: str = "qwen3_vl", decoder=None, deepstack=(0,)) -> Made:
    """A model in Qwen3-VL's frame."""
    own = decoder or text(rope_parameters={**ROPE, "mrope_section": [8, 4, 4]})
    vision = {**VISION, "deepstack_visual_indexes": list(deepstack)}
    config = config_of(
        kind, tokens, text_config=own, vision_config=vision,
        image_token_id=tokens.image_token_id, video_token_id=tokens.video_token_id,
        vision_start_token_id=tokens.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokens.convert_tokens_to_ids("<|vision_end|>"),
    )  # fmt: skip
    images = Qwen2VLImageProcessor(patch_size=16)
    return config, Qwen3VLProcessor(images, tokens, Qwen3VLVideoProcessor(patch_size=16))


VARIANT = Variant(
    make, qwen2_vl.VARIANT.template, qwen2_vl.VARIANT.named, qwen2_vl.VARIANT.marks, eos=qwen2_vl.VARIANT.eos
)
