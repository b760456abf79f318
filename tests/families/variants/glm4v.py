"""GLM-4.1V."""

from transformers import Glm4vImageProcessor, Glm4vProcessor, Glm4vVideoProcessor

from tests.families.variant import ROPE, Made, Variant, config_of, template, text

VISION = {
    "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14,
    "image_size": 56,
}  # fmt: skip
MARKS = (
    "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|user|>", "<|assistant|>",
    "[gMASK]", "<sop>",
)  # fmt: skip
ROPE_OF_3 = {**ROPE, "mrope_section": [8, 4, 4], "partial_rotary_factor": 1.0}


def config(tokens, kind: str, decoder):
    ids = tokens.convert_tokens_to_ids
    return config_of(
        kind, tokens, text_config=decoder, vision_config=dict(VISION),
        image_token_id=tokens.image_token_id, video_token_id=tokens.video_token_id,
        image_start_token_id=ids("<|begin_of_image|>"), image_end_token_id=ids("<|end_of_image|>"),
        video_start_token_id=ids("<|begin_of_video|>"), video_end_token_id=ids("<|end_of_video|>"),
    )  # fmt: skip


def make(tokens, kind: str = "glm4v") -> Made:
    made = config(tokens, kind, text(rope_parameters=ROPE_OF_3))
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}
    return made, Glm4vProcessor(Glm4vImageProcessor(size=size), tokens, Glm4vVideoProcessor())


VARIANT = Variant(
    make,
    template(
        "<|begin_of_image|><|image|><|end_of_image|>", "<|user|>\n", "<|assistant|>\n", bos="[gMASK]<sop>",
        printed=True,
    ),
    named={"image_token": "<|image|>", "video_token": "<|video|>"}, marks=MARKS, eos="<|endoftext|>",
)  # fmt: skip
