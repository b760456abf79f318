"""Command A Vision."""

from transformers import Cohere2VisionImageProcessor, Cohere2VisionProcessor

from tests.families.variant import Made, Variant, config_of, template, text, vision


def make(tokens) -> Made:
    config = config_of(
        "cohere2_vision", tokens, text_config=text("cohere2", layer_types=["sliding_attention", "full_attention"]),
        vision_config=vision("siglip_vision_model", vision_use_head=False), image_token_id=tokens.image_token_id,
        alignment_intermediate_size=128,
    )  # fmt: skip
    images = Cohere2VisionImageProcessor(size={"height": 28, "width": 28}, patch_size=2)
    return config, Cohere2VisionProcessor(images, tokens)


START, END = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
VARIANT = Variant(
    make,
    template("<|IMG_PATCH|>", START + "<|USER_TOKEN|>", START + "<|CHATBOT_TOKEN|>", END, turn_end=END, bos="<bos>"),
    named={
        "image_token": "<|IMG_PATCH|>", "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
    },
    marks=(START, END, "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
)  # fmt: skip
