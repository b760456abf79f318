"""Chameleon: an image becomes tokens of the vocabulary; there is no encoder beside the decoder."""

from transformers import ChameleonImageProcessor, ChameleonProcessor

from tests.families.variant import Made, Variant, config_of, template, text

VQ = {
    "embed_dim": 32, "num_embeddings": 32, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 1],
    "num_res_blocks": 1, "resolution": 32,
}  # fmt: skip


def make(tokens) -> Made:
    letters = "ABCDEFGHIJ"  # of the digits of a code's number
    names = {f"IMGIMG{letters[code // 10]}{letters[code % 10]}Z": code for code in range(32)}
    facts = {name: value for name, value in text().items() if "token" not in name and name != "head_dim"}
    config = config_of(
        "chameleon", tokens, **facts, vq_config=VQ, vocabulary_map={**names, "<image>": tokens.image_token_id},
    )  # fmt: skip
    images = ChameleonImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return config, ChameleonProcessor(images, tokens, image_seq_length=256)


VARIANT = Variant(
    make, template("<image>", "", "<sep>", "<eos>"),
    named={"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>", "sep_token": "<sep>"},
    refused={"load": "no decoder and image encoder of its own"},
)  # fmt: skip
