"""Aya Vision: tiles with marks, of which some are words."""

from transformers import AyaVisionProcessor, GotOcr2ImageProcessor

from tests.families.variant import Made, Variant, config_of, template, text, vision

MARKS = (
    "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "TILE_GLOBAL", *(f"TILE_{index}" for index in range(1, 13)),
)  # fmt: skip


def make(tokens) -> Made:
    config = config_of(
        "aya_vision", tokens, text_config=text("cohere2", layer_types=["sliding_attention", "full_attention"]),
        vision_config=vision("siglip_vision_model", vision_use_head=False),
        image_token_index=tokens.convert_tokens_to_ids("<|IMG_PATCH|>"), alignment_intermediate_size=128,
    )  # fmt: skip
    images = GotOcr2ImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=True)
    return config, AyaVisionProcessor(
        images, tokens, patch_size=7, img_size=28, downsample_factor=2, image_token="<image>"
    )


START = "<|START_OF_TURN_TOKEN|>"
VARIANT = Variant(
    make,
    template(
        "<image>", START + "<|USER_TOKEN|>", START + "<|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
        turn_end="<|END_OF_TURN_TOKEN|>", bos="<bos>",
    ),
    named={"image_token": "<|IMG_PATCH|>"}, marks=("<image>", *MARKS),
)  # fmt: skip
