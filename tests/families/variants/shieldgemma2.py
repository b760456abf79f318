"""ShieldGemma 2: a classifier, whose processor writes the question itself."""

from transformers import Gemma3ImageProcessor, ShieldGemma2Processor

from tests.families.variant import Made, Variant, config_of, text, vision

from . import gemma3


def make(tokens) -> Made:
    config = config_of(
        "shieldgemma2", tokens, text_config=text("gemma3_text", rope_parameters=None, query_pre_attn_scalar=32),
        vision_config=vision("siglip_vision_model", vision_use_head=False),
        mm_tokens_per_image=4, image_token_index=tokens.image_token_id, boi_token_index=tokens.boi_token_id,
        eoi_token_index=tokens.eoi_token_id,
    )  # fmt: skip
    images = Gemma3ImageProcessor(size={"height": 28, "width": 28})
    return config, ShieldGemma2Processor(images, tokens, image_seq_length=4)


VARIANT = Variant(
    make, gemma3.VARIANT.template, gemma3.VARIANT.named, gemma3.VARIANT.marks, refused={"load": "is a classifier"}
)
