"""Perception-LM: a tower of timm's, tiles and a thumbnail."""

import pytest
from transformers import PerceptionLMImageProcessor, PerceptionLMProcessor, PerceptionLMVideoProcessor

from tests.families.variant import Made, Variant, config_of, template, text

from . import mllama


def make(tokens) -> Made:
    pytest.importorskip("timm")
    config = config_of(
        "perception_lm", tokens, text_config=text("llama"), projector_pooling_ratio=2,
        vision_config={
            "model_type": "timm_wrapper", "architecture": "vit_pe_core_tiny_patch16_384", "do_pooling": True,
            "initializer_range": 0.02, "model_args": {
                "embed_dim": 64, "depth": 1, "num_heads": 2, "img_size": [64, 64], "use_post_transformer_norm": False,
            },
        },
        image_token_id=tokens.image_token_id, video_token_id=tokens.video_token_id,
    )  # fmt: skip
    images = PerceptionLMImageProcessor(tile_size=64, max_num_tiles=4, size={"height": 64, "width": 64})
    return config, PerceptionLMProcessor(PerceptionLMVideoProcessor(), images, tokens, patch_size=16, pooling_ratio=2)


VARIANT = Variant(
    make, template("<|image|>", mllama.header("user"), mllama.header("assistant"), "<|eot_id|>", turn_end="<|eot_id|>"),
    named={"image_token": "<|image|>", "video_token": "<|video|>"}, marks=mllama.VARIANT.marks,
)  # fmt: skip
