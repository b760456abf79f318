"""LFM2.5-VL: convolutions between layers of attention; SigLIP2 on tiles and a thumbnail."""

from transformers import Lfm2VlImageProcessor, Lfm2VlProcessor

from tests.families.variant import CHATML, Made, Variant, chatml, config_of, text

MARKS = tuple(f"<|img_row_{row}_col_{column}|>" for row in range(1, 4) for column in range(1, 4))


def make(tokens) -> Made:
    config = config_of(
        "lfm2_vl", tokens,
        text_config=text("lfm2", layer_types=["conv", "full_attention"], block_ff_dim=128, conv_dim=64),
        vision_config={
            "model_type": "siglip2_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 2, "patch_size": 4, "num_patches": 64, "vision_use_head": False,
        },
        image_token_id=tokens.image_token_id, projector_hidden_size=64,
    )  # fmt: skip
    images = Lfm2VlImageProcessor(
        encoder_patch_size=4,
        tile_size=32,
        max_tiles=4,
        min_image_tokens=4,
        max_image_tokens=16,
        max_num_patches=64,
        min_tiles=2,
    )
    return config, Lfm2VlProcessor(images, tokens)


VARIANT = Variant(
    make, chatml("<image>"),
    named={
        "image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
    },
    marks=(*CHATML, *MARKS),
)  # fmt: skip
