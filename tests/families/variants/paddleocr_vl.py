"""PaddleOCR-VL: documents."""

from transformers import PaddleOCRVLImageProcessor, PaddleOCRVLProcessor

from tests.families.variant import ROPE, Made, Variant, config_of, template, text, vision


def make(tokens) -> Made:
    ids = tokens.convert_tokens_to_ids
    config = config_of(
        "paddleocr_vl", tokens, text_config=text(rope_parameters={**ROPE, "mrope_section": [8, 4, 4]}),
        vision_config=vision(size=56, patch=14),
        image_token_id=tokens.image_token_id, video_token_id=ids("<|video|>"),
        vision_start_token_id=ids("<|IMAGE_START|>"), vision_end_token_id=ids("<|IMAGE_END|>"),
    )  # fmt: skip
    images = PaddleOCRVLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64})
    return config, PaddleOCRVLProcessor(images, tokens)


VARIANT = Variant(
    make,
    template(
        "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>", "User: ", "Assistant: ", "</s>", turn_end="\n",
        bos="<|begin_of_sentence|>",
    ),
    named={"image_token": "<|IMAGE_PLACEHOLDER|>"}, marks=("<|IMAGE_START|>", "<|IMAGE_END|>", "<|video|>"),
    bos="<|begin_of_sentence|>", eos="</s>",
)  # fmt: skip
