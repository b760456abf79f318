"""Kimi K2.5: DeepSeek-V3's decoder with experts; images of any shape."""

from transformers import Kimi_K25ImageProcessor, Kimi_K25Processor, Kimi_K25VideoProcessor

from tests.families.variant import Made, Variant, chatml, config_of, text

EXPERTS = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
    "num_key_value_heads": 2,
}  # fmt: skip
MARKS = ("<|im_start|>", "<|im_end|>", "<|media_begin|>", "<|media_end|>")


def make(tokens) -> Made:
    ids = tokens.convert_tokens_to_ids
    config = config_of(
        "kimi_k25", tokens, text_config=text("deepseek_v3", **EXPERTS, **LATENT),
        vision_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "patch_size": 14, "pos_emb_height": 8, "pos_emb_width": 8,
        },
        projection_hidden_size=64, image_token_id=tokens.image_token_id, video_token_id=tokens.video_token_id,
        vision_start_token_id=ids("<|media_begin|>"), vision_end_token_id=ids("<|media_end|>"),
    )  # fmt: skip
    return config, Kimi_K25Processor(Kimi_K25ImageProcessor(max_patches=256), tokens, Kimi_K25VideoProcessor())


VARIANT = Variant(
    make, chatml("<|media_begin|><|media_pad|><|media_end|>"),
    named={"image_token": "<|media_pad|>", "video_token": "<|kimi_k25_video_placeholder|>"}, marks=MARKS,
)  # fmt: skip
