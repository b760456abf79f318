"""MiniCPM-V 4.6: slices and an overview, around Qwen3.5's decoder."""

from transformers import MiniCPMV4_6ImageProcessor, MiniCPMV4_6Processor, MiniCPMV4_6VideoProcessor

from tests.families.variant import CHATML, Made, Variant, chatml, config_of

from . import qwen3_5

NAMED = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>",
    "image_end_token": "</image>", "slice_start_token": "<slice>", "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>",
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 112,
    "patch_size": 14,
}  # fmt: skip
SLICES = {"patch_size": 14, "scale_resolution": 112, "max_slice_nums": 4}


def make(tokens) -> Made:
    config = config_of(
        "minicpmv4_6", tokens, text_config={"model_type": "qwen3_5_text", **qwen3_5.DECODER}, vision_config=VISION,
        insert_layer_id=0, image_size=112, image_token_id=tokens.image_token_id, video_token_id=tokens.video_token_id,
    )  # fmt: skip
    images, videos = MiniCPMV4_6ImageProcessor(**SLICES), MiniCPMV4_6VideoProcessor(**SLICES)
    return config, MiniCPMV4_6Processor(images, videos, tokens)


VARIANT = Variant(make, chatml("<|image_pad|>"), NAMED, CHATML, eos="<|endoftext|>")
