"""Janus-Pro: an image decoder stands beside what reads images."""

from transformers import JanusImageProcessor, JanusProcessor

from tests.families.variant import Made, Variant, config_of, template, text


def make(tokens) -> Made:
    config = config_of(
        "janus", tokens, text_config=text("llama"),
        vision_config={
            "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7,
            "projection_dim": 64, "num_image_tokens": 16, "mlp_ratio": 2.0, "depth": 2,
        },
        vq_config={
            "embed_dim": 8, "num_embeddings": 32, "latent_channels": 32, "base_channels": 32,
            "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_patches": 4, "projection_dim": 64,
            "image_token_embed_dim": 64,
        },
        image_token_id=tokens.image_token_id,
    )  # fmt: skip
    images = JanusImageProcessor(size={"height": 28, "width": 28}, min_size=14)
    return config, JanusProcessor(images, tokens, num_image_tokens=16)


END = "<|end_of_sentence|>"
VARIANT = Variant(
    make, template("<image_placeholder>\n", "<|User|>: ", "<|Assistant|>: ", END, turn_end="\n\n"),
    named={"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"},
    marks=("<|User|>", "<|Assistant|>"), eos=END,
)  # fmt: skip
