"""MiniMax M3: sparse attention and experts."""

from transformers import MiniMaxM3VLImageProcessor, MiniMaxM3VLProcessor, MiniMaxM3VLVideoProcessor

from tests.families.variant import Made, Variant, config_of, template, text

MARKS = ("]<]image[>[", "]<]video[>[", "]<]start of image[>[", "]<]end of image[>[", "]~b]user", "]~b]ai", "[e~[")


def make(tokens) -> Made:
    ids = tokens.convert_tokens_to_ids
    config = config_of(
        "minimax_m3_vl", tokens,
        text_config=text(
            num_local_experts=4, num_experts_per_tok=2, dense_intermediate_size=128, shared_intermediate_size=64,
            rotary_dim=16, mlp_layer_types=["dense", "sparse"], index_head_dim=32, index_n_heads=1,
        ),
        vision_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "patch_size": 14, "image_size": 112,
        },
        projector_hidden_size=64, image_token_index=ids(MARKS[0]), video_token_index=ids(MARKS[1]),
    )  # fmt: skip
    images = MiniMaxM3VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64})
    return config, MiniMaxM3VLProcessor(images, tokens, MiniMaxM3VLVideoProcessor())


VARIANT = Variant(
    make, template(MARKS[0], "]~b]user\n", "]~b]ai\n", "[e~[\n", turn_end="[e~[\n"), marks=MARKS, eos="[e~[",
    refused={"merged": "no place of their own"},
)  # fmt: skip
