"""LLaVA around Qwen2 and SigLIP, as many of the community's models are."""

from transformers import LlavaProcessor, SiglipImageProcessor

from tests.families.variant import CHATML, Made, Variant, chatml, config_of, text, vision


def make(tokens) -> Made:
    config = config_of(
        "llava", tokens, text_config=text("qwen2"), vision_config=vision("siglip_vision_model", vision_use_head=False),
        image_token_index=tokens.image_token_id, vision_feature_select_strategy="full",
    )  # fmt: skip
    images = SiglipImageProcessor(size={"height": 28, "width": 28})
    return config, LlavaProcessor(images, tokens, patch_size=7, vision_feature_select_strategy="full")


VARIANT = Variant(make, chatml("<image>\n"), named={"image_token": "<image>"}, marks=CHATML, eos="<|endoftext|>")
