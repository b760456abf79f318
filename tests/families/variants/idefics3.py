"""Idefics3: tiles, with marks of rows and columns and line breaks."""

from transformers import Idefics3ImageProcessor, Idefics3Processor

from tests.families.variant import Made, Variant, config_of, template, text, vision
from tests.unit.backbone.image_tokens.families import TILES, picked

MARKS = (
    "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)  # fmt: skip


def config(tokens, kind: str):
    return config_of(
        kind, tokens, text_config=text("llama"), vision_config=vision(f"{kind}_vision"),
        image_token_id=tokens.image_token_id, scale_factor=2,
    )  # fmt: skip


def make(tokens) -> Made:
    return config(tokens, "idefics3"), Idefics3Processor(
        picked(Idefics3ImageProcessor)(**TILES), tokens, image_seq_len=4
    )


END = "<end_of_utterance>\n"
VARIANT = Variant(
    make, template("<image>", "User:", "Assistant: ", END, turn_end=END, bos="<|begin_of_text|>"),
    named={"image_token": "<image>"}, marks=MARKS, bos="<|begin_of_text|>",
)  # fmt: skip
