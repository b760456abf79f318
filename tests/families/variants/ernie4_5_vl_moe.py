"""ERNIE 4.5 VL: experts for text and experts for images, chosen by the kind of a token."""

from transformers import Ernie4_5_VLMoeImageProcessor, Ernie4_5_VLMoeProcessor, Ernie4_5_VLMoeVideoProcessor

from tests.families.variant import ROPE, Made, Variant, config_of, template, text

NAMED = {
    "image_token": "<|IMAGE_PLACEHOLDER|>", "image_start_token": "<|IMAGE_START|>", "image_end_token": "<|IMAGE_END|>",
    "video_token": "<|VIDEO_PLACEHOLDER|>", "video_start_token": "<|VIDEO_START|>", "video_end_token": "<|VIDEO_END|>",
}  # fmt: skip


def make(tokens) -> Made:
    config = config_of(
        "ernie4_5_vl_moe", tokens,
        text_config=text(
            rope_parameters={**ROPE, "mrope_section": [4, 4, 8]}, moe_intermediate_size=[64, 64], moe_k=2,
            moe_num_experts=4, moe_num_shared_experts=1, mlp_layer_types=["dense", "sparse"],
        ),
        vision_config={
            "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "patch_size": 14,
        },
        **{f"{name}_id": getattr(tokens, f"{name}_id") for name in NAMED},
    )  # fmt: skip
    images = Ernie4_5_VLMoeImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64})
    return config, Ernie4_5_VLMoeProcessor(images, tokens, Ernie4_5_VLMoeVideoProcessor(draw_on_frames=False))


VARIANT = Variant(
    make, template(
        "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>", "User: ", "Assistant: ", "</s>", turn_end="\n", bos="<s>"
    ),
    named=NAMED, bos="<s>", eos="</s>",
)  # fmt: skip
