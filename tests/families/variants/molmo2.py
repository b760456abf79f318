"""Molmo2: fused projections, a placeholder called a patch."""

from transformers import Molmo2ImageProcessor, Molmo2Processor, Molmo2VideoProcessor

from tests.families.variant import CHATML, Made, Variant, chatml, config_of, text

MARKS = (
    "<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<|image|>", "<frame_start>",
    "<frame_end>", "<|video|>", "<im_low>",
)  # fmt: skip


def make(tokens) -> Made:
    ids = tokens.convert_tokens_to_ids
    config = config_of(
        "molmo2", tokens, text_config=text(additional_vocab_size=64),
        vision_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 32, "image_size": [56, 56], "patch_size": 14,
            "num_position_embeddings": 16,
        },
        adapter_config={
            "vision_feature_layer": [-1, -2], "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 32, "intermediate_size": 128, "text_hidden_size": 64,
        },
        image_start_token_id=ids("<im_start>"), image_end_token_id=ids("<im_end>"), image_patch_id=ids("<im_patch>"),
        low_res_image_start_token_id=ids("<low_res_im_start>"), frame_start_token_id=ids("<frame_start>"),
        frame_end_token_id=ids("<frame_end>"),
    )  # fmt: skip
    images = Molmo2ImageProcessor(size={"height": 56, "width": 56}, max_crops=2, overlap_margins=[1, 1])
    return config, Molmo2Processor(images, Molmo2VideoProcessor(), tokens)


VARIANT = Variant(make, chatml("<|image|>"), marks=(*CHATML, *MARKS), refused={"merged": "no place of their own"})
