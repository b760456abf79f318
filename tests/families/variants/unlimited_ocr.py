"""Unlimited-OCR: DeepSeek-OCR's two encoders around a decoder with windows."""

from transformers import UnlimitedOcrImageProcessor, UnlimitedOcrProcessor

from tests.families.variant import Made, Variant, config_of, text, vision

from . import deepseek_ocr2


def make(tokens) -> Made:
    config = config_of(
        "unlimited_ocr", tokens, text_config=text(**deepseek_ocr2.EXPERTS),
        vision_config={"sam_config": deepseek_ocr2.SAM, "encoder_config": vision(size=224, patch=14)},
        image_token_id=tokens.image_token_id,
    )  # fmt: skip
    return config, UnlimitedOcrProcessor(UnlimitedOcrImageProcessor(max_patches=4), tokens)


VARIANT = Variant(
    make, deepseek_ocr2.VARIANT.template, named=deepseek_ocr2.VARIANT.named, refused=deepseek_ocr2.RENAMED
)
