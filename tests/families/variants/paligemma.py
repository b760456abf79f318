"""PaliGemma: its processor takes the answer apart from the question."""

from transformers import PaliGemmaProcessor, SiglipImageProcessor

from tests.families.variant import Made, Variant, config_of, template, text, vision


def make(tokens) -> Made:
    config = config_of(
        "paligemma", tokens, text_config=text("gemma"),
        vision_config=vision("siglip_vision_model", vision_use_head=False, projection_dim=64),
        image_token_index=tokens.image_token_id, projection_dim=64, hidden_size=64,
    )  # fmt: skip
    images = SiglipImageProcessor(size={"height": 28, "width": 28})
    images.image_seq_length = 16
    return config, PaliGemmaProcessor(images, tokens)


VARIANT = Variant(
    make,
    template("<image>", "", "", "<eos>", turn_end="\n"),
    named={"image_token": "<image>"},
    refused={"load": "PaliGemma"},
)
