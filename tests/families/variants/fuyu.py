"""Fuyu: a decoder that reads patches of an image itself."""

from transformers import FuyuImageProcessor, FuyuProcessor

from tests.families.variant import Made, Variant, config_of, template, text


def make(tokens) -> Made:
    facts = {name: value for name, value in text().items() if name not in ("head_dim", "num_key_value_heads")}
    config = config_of("fuyu", tokens, **facts, text_config=text("persimmon"), patch_size=7, image_token_id=261)
    return config, FuyuProcessor(FuyuImageProcessor(), tokens)


VARIANT = Variant(
    make, template("|SPEAKER|", "", "", "<eos>"), marks=("|SPEAKER|", "|NEWLINE|"),
    refused={"load": "no decoder and image encoder of its own"},
)  # fmt: skip
