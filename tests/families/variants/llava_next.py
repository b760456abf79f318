"""LLaVA-NeXT: tiles in the image's shape."""

from transformers import LlavaNextImageProcessor, LlavaNextProcessor

from tests.families.variant import Made, Variant, config_of, template, text, vision

PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def images() -> LlavaNextImageProcessor:
    return LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=PINPOINTS
    )


def make(tokens) -> Made:
    config = config_of(
        "llava_next", tokens, text_config=text("mistral"), vision_config=vision("clip_vision_model"),
        image_token_index=tokens.image_token_id, image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    return config, LlavaNextProcessor(
        images(), tokens, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


VARIANT = Variant(
    make, template("<image>\n", "[INST] ", "", "</s>", turn_end=" [/INST]", bos="<s>"),
    named={"image_token": "<image>"}, bos="<s>", eos="</s>",
)  # fmt: skip
