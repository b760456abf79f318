"""EXAONE 4.5: Qwen2.5-VL's tower with grouped heads."""

from transformers import Exaone4_5_Processor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from tests.families.variant import Made, Variant, config_of, template, text


def make(tokens) -> Made:
    config = config_of(
        "exaone4_5", tokens, text_config=text("exaone4", sliding_window=None, layer_types=["full_attention"] * 2),
        vision_config={
            "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "num_key_value_heads": 1,
            "out_hidden_size": 64, "patch_size": 14, "fullatt_block_indexes": [1],
        },
        image_token_id=tokens.image_token_id, video_token_id=tokens.video_token_id,
    )  # fmt: skip
    return config, Exaone4_5_Processor(Qwen2VLImageProcessor(), tokens, Qwen2VLVideoProcessor())


VARIANT = Variant(
    make,
    template(
        "<vision><|image_pad|></vision>", "[|user|]\n", "[|assistant|]\n", "[|endofturn|]\n", turn_end="[|endofturn|]\n"
    ),
    named={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    marks=("<vision>", "</vision>", "[|user|]", "[|assistant|]", "[|endofturn|]"),
)  # fmt: skip
