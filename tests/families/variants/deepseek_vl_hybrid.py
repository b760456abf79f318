"""DeepSeek-VL 7B: a second tower (SAM) reads the image at a higher resolution."""

from transformers import DeepseekVLHybridImageProcessor, DeepseekVLHybridProcessor

from tests.families.variant import Made, Variant, config_of, text, vision

from . import deepseek_vl


def make(tokens) -> Made:
    config = config_of(
        "deepseek_vl_hybrid", tokens, text_config=text("llama"),
        vision_config=vision("siglip_vision_model", size=384, patch=16, vision_use_head=False),
        high_res_vision_config={
            "model_type": "sam_vision_model", "hidden_size": 64, "output_channels": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 128, "patch_size": 16, "window_size": 4, "mlp_dim": 128,
            "global_attn_indexes": [1], "initializer_range": 0.02,
        },
        image_token_id=tokens.image_token_id,
    )  # fmt: skip
    images = DeepseekVLHybridImageProcessor(
        size={"height": 384, "width": 384}, high_res_size={"height": 128, "width": 128}, min_size=14
    )
    return config, DeepseekVLHybridProcessor(images, tokens, num_image_tokens=576)


VARIANT = Variant(
    make, deepseek_vl.VARIANT.template, deepseek_vl.VARIANT.named, eos=deepseek_vl.VARIANT.eos,
    refused={"cached": "other features of an image than can be kept"},
)  # fmt: skip
