"""Idefics 1: its decoder holds the image encoder, and reads it through gated cross-attention."""

from transformers import IdeficsImageProcessor, IdeficsProcessor

from tests.families.variant import Made, Variant, config_of, template, text


def make(tokens) -> Made:
    facts = {name: value for name, value in text().items() if name not in ("head_dim", "num_key_value_heads")}
    config = config_of(
        "idefics", tokens, **{name: value for name, value in facts.items() if not name.endswith("_token_id")},
        cross_layer_interval=1, additional_vocab_size=0, qk_layer_norms=False, use_resampler=False,
        vision_config={
            "embed_dim": 64, "image_size": 28, "intermediate_size": 128, "patch_size": 7, "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    )  # fmt: skip
    return config, IdeficsProcessor(IdeficsImageProcessor(image_size=28), tokens)


VARIANT = Variant(
    make, template("<image>", "User: ", "Assistant: ", "<eos>"), named={"image_token": "<image>"},
    marks=("<fake_token_around_image>",), refused={"load": "image encoder inside its decoder"},
)  # fmt: skip
