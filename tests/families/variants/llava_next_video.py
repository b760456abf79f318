"""LLaVA-NeXT-Video, on images."""

from transformers import LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor

from tests.families.variant import Made, Variant, config_of, text, vision

from . import llava, llava_next


def make(tokens) -> Made:
    config = config_of(
        "llava_next_video", tokens, text_config=text("llama"), vision_config=vision("clip_vision_model"),
        image_token_index=tokens.image_token_id, video_token_index=tokens.video_token_id,
        image_grid_pinpoints=llava_next.PINPOINTS,
    )  # fmt: skip
    return config, LlavaNextVideoProcessor(
        LlavaNextVideoVideoProcessor(),
        llava_next.images(),
        tokens,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


VARIANT = Variant(
    make, llava.VARIANT.template, named={"image_token": "<image>", "video_token": "<video>"}, bos="<s>", eos="</s>"
)
