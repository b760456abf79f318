"""BLIP-2: a Q-Former reads the image."""

from transformers import Blip2Processor, BlipImageProcessor

from tests.families.variant import Made, Variant, config_of, template, text, vision


def config(tokens, kind: str):
    facts = text("opt", ffn_dim=128, word_embed_proj_dim=64, dropout=0.0)
    return config_of(
        kind, tokens, text_config=facts, vision_config=vision(initializer_range=0.02),
        qformer_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "encoder_hidden_size": 64, "vocab_size": 32, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        num_query_tokens=4, image_token_index=tokens.image_token_id,
    )  # fmt: skip


def make(tokens) -> Made:
    images = BlipImageProcessor(size={"height": 28, "width": 28})
    return config(tokens, "blip-2"), Blip2Processor(images, tokens, num_query_tokens=4)


VARIANT = Variant(
    make,
    template("<image>", "Question: ", " Answer: ", "</s>"),
    named={"image_token": "<image>"},
    bos="<s>",
    eos="</s>",
    refused={"load": "reads no chat template"},
)
