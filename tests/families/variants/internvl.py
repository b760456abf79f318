"""InternVL 3 and 3.5: tiles."""

from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

from tests.families.variant import CHATML, Made, Variant, chatml, config_of, text, vision


def make(tokens, kind: str = "qwen2") -> Made:
    config = config_of(
        "internvl", tokens, text_config=text(kind), vision_config=vision("internvl_vision"),
        image_token_id=tokens.context_image_token_id, image_seq_length=4,
    )  # fmt: skip
    images = GotOcr2ImageProcessor(size={"height": 28, "width": 28})
    return config, InternVLProcessor(images, tokens, InternVLVideoProcessor(), image_seq_length=4)


VARIANT = Variant(
    make, chatml("<IMG_CONTEXT>\n"),
    named={
        "context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>",
        "video_token": "<video>",
    },
    marks=CHATML, eos="<|endoftext|>",
)  # fmt: skip
