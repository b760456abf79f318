"""VipLLaVA: features of several layers of CLIP."""

from transformers import CLIPImageProcessor, LlavaProcessor

from tests.families.variant import Made, Variant, config_of, text, vision

from . import llava


def make(tokens) -> Made:
    config = config_of(
        "vipllava", tokens, text_config=text("llama"), vision_config=vision("clip_vision_model"),
        image_token_index=tokens.image_token_id, vision_feature_layer=[-1, -2], image_seq_length=16,
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return config, LlavaProcessor(
        images, tokens, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


VARIANT = Variant(make, llava.VARIANT.template, llava.VARIANT.named, bos="<s>", eos="</s>")
