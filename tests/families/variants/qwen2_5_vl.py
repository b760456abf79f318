"""Qwen2.5-VL: windows in its tower."""

from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from tests.families.variant import ROPE, Made, Variant, config_of, text

from . import qwen2_vl

VISION = {
    "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14,
    "fullatt_block_indexes": [1],
}  # fmt: skip


def make(tokens, depth: int = 2) -> Made:
    config = config_of(
        "qwen2_5_vl", tokens, text_config=text(rope_parameters={**ROPE, "mrope_section": [8, 4, 4]}),
        vision_config={**VISION, "depth": depth},
        image_token_id=tokens.image_token_id, video_token_id=tokens.video_token_id,
        vision_start_token_id=tokens.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokens.convert_tokens_to_ids("<|vision_end|>"),
    )  # fmt: skip
    return config, Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), tokens, Qwen2VLVideoProcessor())


VARIANT = Variant(
    make, qwen2_vl.VARIANT.template, qwen2_vl.VARIANT.named, qwen2_vl.VARIANT.marks, eos=qwen2_vl.VARIANT.eos
)
