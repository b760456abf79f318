"""Qianfan-OCR: InternVL's tiles."""

from transformers import GotOcr2ImageProcessor, QianfanOCRProcessor

from tests.families.variant import CHATML, Made, Variant, chatml, config_of, text, vision


def make(tokens) -> Made:
    config = config_of(
        "qianfan_ocr", tokens, text_config=text("qwen3"),
        vision_config={**vision(), "image_size": [28, 28], "patch_size": [7, 7], "drop_path_rate": 0.0},
        image_token_id=tokens.context_image_token_id, image_seq_length=4,
    )  # fmt: skip
    images = GotOcr2ImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=True)
    return config, QianfanOCRProcessor(images, tokens, image_seq_length=4)


VARIANT = Variant(
    make, chatml("<image>\n"),
    named={"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"},
    marks=(*CHATML, "<image>"), eos="<|endoftext|>",
)  # fmt: skip
