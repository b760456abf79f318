"""Emu3: an image becomes tokens of the vocabulary, by an encoder that also decodes."""

from transformers import Emu3ImageProcessor, Emu3Processor

from tests.families.variant import Made, Variant, config_of, template, text

NAMED = {
    "image_token": "<image>", "boi_token": "<|image start|>", "eoi_token": "<|image end|>",
    "image_wrapper_token": "<|image token|>", "eof_token": "<|extra_201|>",
}  # fmt: skip
VQ = {
    "codebook_size": 32, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1, 1, 1, 1],
    "num_res_blocks": 1, "hidden_size": 32,
}  # fmt: skip


def make(tokens) -> Made:
    visual = {f"<|visual token {number:06d}|>": number for number in range(32)}
    config = config_of(
        "emu3", tokens, text_config=text(), vq_config=VQ,
        vocabulary_map={**visual, "<image>": tokens.image_token_id, "<|extra_200|>": 33},
    )  # fmt: skip
    return config, Emu3Processor(Emu3ImageProcessor(min_pixels=1024, max_pixels=4096), tokens)


VARIANT = Variant(
    make, template("<image>", "User: ", " Assistant: ", "<eos>"), named=NAMED,
    refused={"load": "no decoder and image encoder of its own"},
)  # fmt: skip
