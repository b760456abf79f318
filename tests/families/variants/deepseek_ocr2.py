"""DeepSeek-OCR 2: SAM's features, read by queries in a second encoder; experts."""

from transformers import DeepseekOcr2ImageProcessor, DeepseekOcr2Processor

from tests.families.variant import Made, Variant, config_of, template, text

SAM = {
    "hidden_size": 64, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 1024,
    "patch_size": 16, "window_size": 4, "global_attn_indexes": [], "mlp_dim": 128, "initializer_range": 0.02,
    "downsample_channels": [32, 64],
}  # fmt: skip
EXPERTS = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "mlp_layer_types": ["dense", "sparse"], "n_group": 1, "topk_group": 1,
}  # fmt: skip


def make(tokens) -> Made:
    config = config_of(
        "deepseek_ocr2", tokens, text_config=text(**EXPERTS),
        vision_config={"sam_config": SAM, "encoder_config": text()}, image_token_id=tokens.image_token_id,
    )  # fmt: skip
    return config, DeepseekOcr2Processor(DeepseekOcr2ImageProcessor(), tokens)


RENAMED = {"LoRA": "under other names", "merged": "under other names"}
VARIANT = Variant(
    make, template("<image>\n", "User: ", "Assistant: ", "<eos>", turn_end="\n\n"), named={"image_token": "<image>"},
    refused=RENAMED,
)  # fmt: skip
