"""Inkling 2: experts in every layer, attention with relative positions."""

from transformers import Inkling2ImageProcessor, Inkling2Processor

from tests.families.variant import Made, Variant, chatml, config_of, text, CHATML


def make(tokens) -> Made:
    config = config_of(
        "inkling2", tokens,
        text_config=text(
            unpadded_vocab_size=384, swa_num_attention_heads=2, swa_num_key_value_heads=1, swa_head_dim=32, d_rel=16,
            rel_extent=64, layer_types=["sliding_attention", "full_attention"], moe_intermediate_size=64,
            n_routed_experts=4, num_experts_per_tok=2, n_layers_per_attn_res_block=1,
        ),
        vision_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "patch_size": 14, "posemb_grid_size": 8, "projection_hidden_dim": 64, "text_hidden_size": 64,
        },
        image_token_id=tokens.image_token_id,
    )  # fmt: skip
    return config, Inkling2Processor(Inkling2ImageProcessor(size={"height": 28, "width": 28}), tokens)


VARIANT = Variant(make, chatml("<|image|>"), named={"image_token": "<|image|>"}, marks=CHATML)
