"""Gemma 3: images of one size, whose tokens attend to each other in both directions."""

from transformers import Gemma3ImageProcessor, Gemma3Processor

from tests.families.variant import Made, Variant, config_of, template, text, vision


def make(tokens) -> Made:
    config = config_of(
        "gemma3", tokens, text_config=text(rope_parameters=None, query_pre_attn_scalar=32),
        vision_config=vision("siglip_vision_model", vision_use_head=False),
        mm_tokens_per_image=4, image_token_index=tokens.image_token_id, boi_token_index=tokens.boi_token_id,
        eoi_token_index=tokens.eoi_token_id,
    )  # fmt: skip
    return config, Gemma3Processor(Gemma3ImageProcessor(size={"height": 28, "width": 28}), tokens, image_seq_length=4)


END = "<end_of_turn>\n"
VARIANT = Variant(
    make,
    template("<start_of_image>", "<start_of_turn>user\n", "<start_of_turn>model\n", END, turn_end=END, bos="<bos>"),
    named={"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    marks=("<start_of_turn>", "<end_of_turn>"),
)
