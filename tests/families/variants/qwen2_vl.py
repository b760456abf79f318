"""Qwen2-VL."""

from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

from tests.families.variant import CHATML, ROPE, Made, Variant, chatml, config_of, text


def make(tokens) -> Made:
    config = config_of(
        "qwen2_vl", tokens, text_config=text(rope_parameters={**ROPE, "mrope_section": [8, 4, 4]}),
        vision_config={
            "depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14,
        },
        image_token_id=tokens.image_token_id, video_token_id=tokens.video_token_id,
        vision_start_token_id=tokens.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokens.convert_tokens_to_ids("<|vision_end|>"),
    )  # fmt: skip
    return config, Qwen2VLProcessor(Qwen2VLImageProcessor(), tokens, Qwen2VLVideoProcessor())


VARIANT = Variant(
    make, chatml("<|vision_start|><|image_pad|><|vision_end|>"),
    named={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    marks=(*CHATML, "<|vision_start|>", "<|vision_end|>"), eos="<|endoftext|>",
)  # fmt: skip
