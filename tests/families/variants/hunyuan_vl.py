"""HunYuan-VL: an image's rows end in tokens of their own, inside the placeholders."""

from transformers import HunYuanVLImageProcessor, HunYuanVLProcessor

from tests.families.variant import ROPE, Made, Variant, config_of, template, text


def make(tokens) -> Made:
    ids = tokens.convert_tokens_to_ids
    config = config_of(
        "hunyuan_vl", tokens, text_config=text(rope_parameters={**ROPE, "mrope_section": [4, 4, 4, 4]}),
        vision_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "out_hidden_size": 64, "text_hidden_size": 64, "patch_size": 16, "max_image_size": 128,
            "min_image_size": 32, "max_vit_seq_len": 256,
        },
        image_token_id=tokens.image_token_id, im_start_id=ids("<img_start>"), im_end_id=ids("<img_end>"),
        im_newline_id=ids("<img_newline>"),
    )  # fmt: skip
    images = HunYuanVLImageProcessor(size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128})
    return config, HunYuanVLProcessor(images, tokens)


VARIANT = Variant(
    make, template("<img_start><img><img_end>", "<user>", "<assistant>", "<eos>"),
    named={"image_token": "<img>", "image_start_token": "<img_start>", "image_end_token": "<img_end>"},
    marks=("<img_newline>", "<user>", "<assistant>"),
)  # fmt: skip
