"""Llama 3.2 Vision: reads images through cross-attention."""

from transformers import MllamaImageProcessor, MllamaProcessor

from tests.families.variant import Made, Variant, config_of, template, text


def make(tokens) -> Made:
    facts = text(cross_attention_layers=[1], num_key_value_heads=2)
    facts.pop("head_dim")
    config = config_of(
        "mllama", tokens, text_config=facts,
        vision_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_global_layers": 1,
            "attention_heads": 2, "vision_output_dim": 128, "image_size": 28, "patch_size": 7, "max_num_tiles": 4,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        },
        image_token_index=tokens.image_token_id,
    )  # fmt: skip
    images = MllamaImageProcessor(size={"height": 28, "width": 28}, max_image_tiles=4)
    return config, MllamaProcessor(images, tokens)


def header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


VARIANT = Variant(
    make,
    template(
        "<|image|>", header("user"), header("assistant"), "<|eot_id|>", turn_end="<|eot_id|>", bos="<|begin_of_text|>"
    ),
    named={"image_token": "<|image|>"}, marks=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    bos="<|begin_of_text|>", 
    refused={"cached": "gives no features of images"},
)  # fmt: skip
