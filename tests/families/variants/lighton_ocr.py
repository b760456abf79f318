"""LightOnOCR: Pixtral's tower under Qwen3."""

from transformers import LightOnOcrProcessor, PixtralImageProcessor

from tests.families.variant import CHATML, Made, Variant, chatml, config_of, text

from . import mistral3


def make(tokens) -> Made:
    config = config_of(
        "lighton_ocr", tokens, text_config=text("qwen3"), vision_config=mistral3.TOWER,
        image_token_id=tokens.image_token_id, spatial_merge_size=2,
    )  # fmt: skip
    images = PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
    return config, LightOnOcrProcessor(images, tokens, patch_size=7, spatial_merge_size=2)


VARIANT = Variant(
    make, chatml("<|image_pad|>"),
    named={"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"},
    marks=CHATML, eos="<|endoftext|>",
)  # fmt: skip
