"""DeepSeek-VL."""

from transformers import DeepseekVLImageProcessor, DeepseekVLProcessor

from tests.families.variant import Made, Variant, config_of, template, text, vision


def make(tokens) -> Made:
    config = config_of(
        "deepseek_vl", tokens, text_config=text("llama"),
        vision_config=vision("siglip_vision_model", vision_use_head=False), image_token_id=tokens.image_token_id,
    )  # fmt: skip
    images = DeepseekVLImageProcessor(size={"height": 28, "width": 28}, min_size=14)
    return config, DeepseekVLProcessor(images, tokens, num_image_tokens=16)


END = "<|end_of_sentence|>"
VARIANT = Variant(
    make, template("<image_placeholder>", "User: ", "Assistant: ", END, turn_end="\n\n", bos="<bos>"),
    named={"image_token": "<image_placeholder>"}, eos=END,
)  # fmt: skip
