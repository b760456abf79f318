"""Florence-2: an encoder-decoder."""

from transformers import LlavaProcessor, SiglipImageProcessor

from tests.families.variant import VOCABULARY, Made, Variant, config_of, template


def make(tokens) -> Made:
    config = config_of(
        "florence2", tokens,
        text_config={
            "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": VOCABULARY,
            "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258, "decoder_start_token_id": 258,
            "forced_eos_token_id": 258,
        },
        vision_config={
            "embed_dim": [16, 16], "depths": [1, 1], "num_heads": [2, 2], "num_groups": [2, 2], "patch_size": [7, 3],
            "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True], "window_size": 4,
            "projection_dim": 64,
        },
        image_token_id=tokens.image_token_id,
    )  # fmt: skip
    return config, LlavaProcessor(SiglipImageProcessor(), tokens, patch_size=8)  # its own wants BART's tokenizer


VARIANT = Variant(
    make, template("<image>", "", "", "<eos>"), named={"image_token": "<image>"},
    refused={"load": "encoder-decoders"},
)  # fmt: skip
