"""MiniCPM-OCR: MiniCPM-V 4.6's slices for documents, four times as many tokens."""

from transformers import MiniCPMOcrImageProcessor, MiniCPMOcrProcessor, MiniCPMOcrVideoProcessor

from tests.families.variant import Made, Variant, config_of

from . import minicpmv4_6, qwen3_5


def make(tokens) -> Made:
    config = config_of(
        "minicpm_ocr", tokens, text_config={"model_type": "qwen3_5_text", **qwen3_5.DECODER},
        vision_config=minicpmv4_6.VISION, insert_layer_id=0, image_token_id=tokens.image_token_id,
        video_token_id=tokens.video_token_id,
    )  # fmt: skip
    slices = minicpmv4_6.SLICES
    images, videos = MiniCPMOcrImageProcessor(**slices), MiniCPMOcrVideoProcessor(**slices)
    return config, MiniCPMOcrProcessor(images, videos, tokens)


VARIANT = Variant(
    make, minicpmv4_6.VARIANT.template, minicpmv4_6.NAMED, minicpmv4_6.VARIANT.marks, eos=minicpmv4_6.VARIANT.eos
)
