"""LFM3-VL: convolutions in the vision tower too; images in Qwen's grids."""

from transformers import Lfm3VlProcessor, Qwen2VLImageProcessor, Qwen3VLVideoProcessor

from tests.families.variant import Made, Variant, config_of, text

from . import qwen2_vl


def make(tokens) -> Made:
    config = config_of(
        "lfm3_vl", tokens,
        text_config=text("lfm3", layer_types=["conv", "full_attention"], rope_parameters=None),
        vision_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "patch_size": 16, "layer_types": ["conv", "full_attention"],
        },
        projector_hidden_size=64, image_token_id=tokens.image_token_id, video_token_id=tokens.video_token_id,
        vision_start_token_id=tokens.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokens.convert_tokens_to_ids("<|vision_end|>"),
    )  # fmt: skip
    images = Qwen2VLImageProcessor(patch_size=16)
    return config, Lfm3VlProcessor(images, tokens, Qwen3VLVideoProcessor(patch_size=16))


VARIANT = Variant(
    make, qwen2_vl.VARIANT.template, qwen2_vl.VARIANT.named, qwen2_vl.VARIANT.marks, eos=qwen2_vl.VARIANT.eos
)
