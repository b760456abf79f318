"""Cosmos 3 Edge: NVIDIA's small model of the physical world."""

from transformers import Cosmos3EdgeImageProcessor, Cosmos3EdgeProcessor, Qwen3VLVideoProcessor

from tests.families.variant import ROPE, Made, Variant, config_of, text

from . import qwen2_vl


def make(tokens) -> Made:
    config = config_of(
        "cosmos3_edge", tokens, text_config=text(rope_parameters={**ROPE, "mrope_section": [8, 4, 4]}),
        vision_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "patch_size": 16,
        },
        projector_hidden_size=64, image_token_id=tokens.image_token_id, video_token_id=tokens.video_token_id,
        vision_start_token_id=tokens.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokens.convert_tokens_to_ids("<|vision_end|>"),
    )  # fmt: skip
    images = Cosmos3EdgeImageProcessor(size={"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 64})
    return config, Cosmos3EdgeProcessor(images, tokens, Qwen3VLVideoProcessor(patch_size=16))


VARIANT = Variant(
    make, qwen2_vl.VARIANT.template, qwen2_vl.VARIANT.named, qwen2_vl.VARIANT.marks, eos=qwen2_vl.VARIANT.eos
)
