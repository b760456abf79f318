"""Granite 4 Vision: a list of projectors, each for a layer of its own."""

from transformers import Granite4VisionProcessor, LlavaNextImageProcessor

from tests.families.variant import Made, Variant, config_of, template, text, vision

PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def make(tokens) -> Made:
    facts = text(num_hidden_layers=6)
    facts.pop("head_dim")
    config = config_of(
        "granite4_vision", tokens, text_config=facts,
        vision_config=vision("siglip_vision_model", size=32, patch=8, vision_use_head=False),
        qformer_config={
            "model_type": "blip_2_qformer", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
            "num_attention_heads": 2, "encoder_hidden_size": 64, "vocab_size": 32,
        },
        image_token_index=tokens.image_token_id, image_grid_pinpoints=PINPOINTS, vision_feature_select_strategy="full",
        downsample_rate="2/4", deepstack_layer_map=[[-1, 0], [-2, 1]], spatial_target_layers=[2, 3, 4, 5],
    )  # fmt: skip
    images = LlavaNextImageProcessor(
        size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=PINPOINTS
    )
    return config, Granite4VisionProcessor(
        images, tokens, patch_size=8, vision_feature_select_strategy="full", downsample_rate="2/4"
    )


END = "<|end_of_text|>\n"
VARIANT = Variant(
    make,
    template(
        "<image>", "<|start_of_role|>user<|end_of_role|>", "<|start_of_role|>assistant<|end_of_role|>", END,
        turn_end=END,
    ),
    named={"image_token": "<image>"}, marks=("<|start_of_role|>", "<|end_of_role|>"),
    refused={"cached": "other features of an image"}, eos="<|end_of_text|>",
)  # fmt: skip
