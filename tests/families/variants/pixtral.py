"""Pixtral 12B: in LLaVA's frame, images of any shape."""

from tests.families.variant import Made, Variant, config_of, text

from . import mistral3


def make(tokens) -> Made:
    config = config_of(
        "llava", tokens, text_config=text("mistral"), vision_config=mistral3.TOWER,
        image_token_index=tokens.image_token_id, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    return config, mistral3.processor(tokens, 1)


VARIANT = Variant(
    make, mistral3.VARIANT.template, mistral3.VARIANT.named, mistral3.VARIANT.marks, bos="<s>", eos="</s>"
)
