"""Ovis2: images as distributions over visual words."""

from transformers import Ovis2ImageProcessor, Ovis2Processor

from tests.families.variant import CHATML, Made, Variant, chatml, config_of, text, vision

MARKS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")


def make(tokens) -> Made:
    config = config_of(
        "ovis2", tokens, text_config=text("qwen2"), vision_config=vision(vocab_size=64, num_visual_indicator_tokens=5),
        image_token_id=tokens.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokens.convert_tokens_to_ids(list(MARKS)), vocab_size=384, hidden_size=64,
    )  # fmt: skip
    images = Ovis2ImageProcessor(size={"height": 28, "width": 28})
    return config, Ovis2Processor(images, tokens, image_seq_length=16)


VARIANT = Variant(
    make,
    chatml("<image>\n"),
    marks=(*CHATML, "<image>", "<IMG_ATOM>", *MARKS),
    refused={"cached": "other features of an image"},
    eos="<|endoftext|>",
)
