"""Granite-Docling: documents; tiles, whose projector and mergers stand inside the vision tower."""

from transformers import GraniteDoclingImageProcessor, GraniteDoclingProcessor

from tests.families.variant import Made, Variant, config_of, template, text, vision

from . import idefics3

TURN = ("<|start_of_role|>", "<|end_of_role|>")


def make(tokens) -> Made:
    config = config_of(
        "granite_docling", tokens, text_config=text(),
        vision_config=vision(
            size=32, patch=4, out_hidden_size=64, scale_factor=4, deepstack_visual_indexes=[0], use_fine_route=False
        ),
        image_token_id=tokens.image_token_id,
    )  # fmt: skip
    images = GraniteDoclingImageProcessor(size={"height": 32, "width": 32}, max_patches=4)
    return config, GraniteDoclingProcessor(images, tokens, image_seq_len=4)


END = "<|end_of_text|>\n"
VARIANT = Variant(
    make, template("<image>", f"{TURN[0]}user{TURN[1]}", f"{TURN[0]}assistant{TURN[1]}", END, turn_end=END),
    named={"image_token": "<image>"}, marks=(*idefics3.MARKS, *TURN), eos="<|end_of_text|>",
)  # fmt: skip
