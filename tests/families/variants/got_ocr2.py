"""GOT-OCR2: documents; its processor wants an image."""

from transformers import GotOcr2ImageProcessor, GotOcr2Processor

from tests.families.variant import CHATML, Made, Variant, chatml, config_of, text


def config(tokens, kind: str):
    return config_of(
        kind, tokens, text_config=text("qwen2"),
        vision_config={
            "hidden_size": 64, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 256, "patch_size": 4, "window_size": 4, "global_attn_indexes": [], "mlp_dim": 128,
            "initializer_range": 0.02,
        },
        image_token_index=tokens.convert_tokens_to_ids("<imgpad>"), image_seq_length=256,
    )  # fmt: skip


def make(tokens) -> Made:
    images = GotOcr2ImageProcessor(size={"height": 256, "width": 256})
    return config(tokens, "got_ocr2"), GotOcr2Processor(images, tokens)


VARIANT = Variant(
    make, chatml("<img><imgpad></img>\n"), marks=(*CHATML, "<img>", "</img>", "<imgpad>"), eos="<|endoftext|>"
)
