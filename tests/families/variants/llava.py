"""LLaVA-1.5: CLIP, images of one size."""

from transformers import CLIPImageProcessor, LlavaProcessor

from tests.families.variant import Made, Variant, config_of, template, text, vision


def make(tokens) -> Made:
    config = config_of(
        "llava", tokens, text_config=text("llama"), vision_config=vision("clip_vision_model"),
        image_token_index=tokens.image_token_id,
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return config, LlavaProcessor(
        images, tokens, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


VARIANT = Variant(
    make, template("<image>\n", "USER: ", "ASSISTANT: ", "</s>", turn_end=" ", bos="<s>"),
    named={"image_token": "<image>"}, bos="<s>", eos="</s>",
)  # fmt: skip
