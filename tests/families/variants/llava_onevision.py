"""LLaVA-OneVision: tiles in the image's shape, a feature for every line's end."""

from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

from tests.families.variant import CHATML, Made, Variant, chatml, config_of, text, vision

PINPOINTS = [[28 * rows, 28 * columns] for rows in range(1, 5) for columns in range(1, 5)]


def make(tokens) -> Made:
    config = config_of(
        "llava_onevision", tokens, text_config=text("qwen2"),
        vision_config=vision("siglip_vision_model", vision_use_head=False),
        image_token_index=tokens.image_token_id, video_token_index=tokens.video_token_id,
        image_grid_pinpoints=PINPOINTS, vision_aspect_ratio="anyres_max_5",
    )  # fmt: skip
    images = LlavaOnevisionImageProcessor(size={"height": 28, "width": 28}, image_grid_pinpoints=PINPOINTS)
    return config, LlavaOnevisionProcessor(
        images, tokens, LlavaOnevisionVideoProcessor(), num_image_tokens=16, vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_5",
    )  # fmt: skip


VARIANT = Variant(
    make, chatml("<image>\n"), named={"image_token": "<image>", "video_token": "<video>"}, marks=CHATML,
    eos="<|endoftext|>",
)  # fmt: skip
