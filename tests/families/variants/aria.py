"""Aria: experts as 3-D parameters; its model does not cast pixels."""

from transformers import AriaImageProcessor, AriaProcessor

from tests.families.variant import CHATML, Made, Variant, chatml, config_of, text, vision


def make(tokens) -> Made:
    config = config_of(
        "aria", tokens, text_config=text("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        vision_config=vision("idefics3_vision", size=980, patch=140), image_token_index=tokens.image_token_id,
        projector_patch_to_query_dict={49: 4},
    )  # fmt: skip
    return config, AriaProcessor(AriaImageProcessor(), tokens, size_conversion={980: 4})


VARIANT = Variant(
    make, chatml("<fim_prefix><|img|><fim_suffix>"), named={"image_token": "<|img|>"},
    marks=(*CHATML, "<fim_prefix>", "<fim_suffix>"),
)  # fmt: skip
