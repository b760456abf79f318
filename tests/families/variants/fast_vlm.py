"""FastVLM: a tower of timm's."""

import pytest
from transformers import CLIPImageProcessor, LlavaProcessor

from tests.families.variant import CHATML, Made, Variant, chatml, config_of, text


def make(tokens) -> Made:
    pytest.importorskip("timm")
    config = config_of(
        "fast_vlm", tokens, text_config=text("qwen2"), image_token_index=tokens.image_token_id, image_seq_length=4,
        vision_config={
            "model_type": "timm_wrapper", "architecture": "fastvit_mci0", "do_pooling": True, "global_pool": "avg",
            "hidden_size": 1024, "model_args": {"inference_mode": True},
        },
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": 128}, crop_size={"height": 128, "width": 128})
    return config, LlavaProcessor(images, tokens, patch_size=64, vision_feature_select_strategy="full")


VARIANT = Variant(make, chatml("<image>\n"), named={"image_token": "<image>"}, marks=CHATML, eos="<|endoftext|>")
