"""Llama 4: its decoder holds the head, its router is a linear layer of another kind, its experts are 3-D parameters."""

from transformers import Llama4ImageProcessor, Llama4Processor

from tests.families.variant import Made, Variant, config_of, template, text

MARKS = ("<|image_start|>", "<|image_end|>", "<|image|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>")


def make(tokens) -> Made:
    config = config_of(
        "llama4", tokens,
        text_config=text(
            intermediate_size_mlp=128, num_local_experts=2, moe_layers=[1], layer_types=["full_attention"] * 2
        ),
        vision_config={
            "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 7, "vision_output_dim": 64, "projector_input_dim": 64,
            "projector_output_dim": 64,
        },
        image_token_index=tokens.convert_tokens_to_ids("<|patch|>"),
    )  # fmt: skip
    images = Llama4ImageProcessor(size={"height": 28, "width": 28})
    return config, Llama4Processor(images, tokens, patch_size=7)


VARIANT = Variant(
    make,
    template("<|image|>", "<|header|>user\n\n", "<|header|>assistant\n\n", "<|eot|>", turn_end="<|eot|>", bos="<bos>"),
    marks=(*MARKS, "<|header|>", "<|eot|>"), refused={"cached": "other features of an image"},
)  # fmt: skip
