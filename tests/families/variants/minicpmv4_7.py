"""MiniCPM-V 4.7: 4.6's slices, with positions on a canvas."""

from transformers import MiniCPMV4_6ImageProcessor, MiniCPMV4_6VideoProcessor, MiniCPMV4_7Processor

from tests.families.variant import Made, Variant, config_of

from . import minicpmv4_6, qwen3_5

MARKS = {"image_start": "image", "image_end": "/image", "slice_start": "slice", "slice_end": "/slice"}


def make(tokens) -> Made:
    config = config_of(
        "minicpmv4_7", tokens, text_config={"model_type": "qwen3_5_text", **qwen3_5.DECODER},
        vision_config=minicpmv4_6.VISION, insert_layer_id=0, image_size=112, image_token_id=tokens.image_token_id,
        video_token_id=tokens.video_token_id, newline_id=tokens.convert_tokens_to_ids("Ċ"),
        **{f"{name}_id": tokens.convert_tokens_to_ids(f"<{mark}>") for name, mark in MARKS.items()},
    )  # fmt: skip
    slices = minicpmv4_6.SLICES
    images, videos = MiniCPMV4_6ImageProcessor(**slices), MiniCPMV4_6VideoProcessor(**slices)
    return config, MiniCPMV4_7Processor(images, videos, tokens)


VARIANT = Variant(
    make, minicpmv4_6.VARIANT.template, minicpmv4_6.NAMED, minicpmv4_6.VARIANT.marks, eos=minicpmv4_6.VARIANT.eos
)
