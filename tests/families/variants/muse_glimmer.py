"""Muse Glimmer: images of any shape, windows in the decoder."""

from transformers import MuseGlimmerImageProcessor, MuseGlimmerProcessor, MuseGlimmerVideoProcessor

from tests.families.variant import Made, Variant, config_of, template, text

MARKS = (
    "<|patch|>", "<|image_start|>", "<|image_end|>", "<|video|>", "<|vid_frame_separator|>", "<|vid_start|>",
    "<|vid_end|>", "<|header_start|>", "<|header_end|>",
)  # fmt: skip


def header(role: str) -> str:
    return f"<|header_start|>{role}<|header_end|>\n\n"


def make(tokens) -> Made:
    ids = tokens.convert_tokens_to_ids
    config = config_of(
        "muse_glimmer", tokens,
        text_config=text(layer_types=["sliding_attention", "full_attention"], layer_rope_theta=[1e4, 1e4]),
        vision_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "patch_size": 14, "pos_emb_height": 8, "pos_emb_width": 8, "max_position_embeddings": 64,
        },
        out_hidden_size=256, projector_hidden_size=64, image_token_id=ids("<|patch|>"), video_token_id=ids("<|video|>"),
    )  # fmt: skip
    images = MuseGlimmerImageProcessor(max_image_tokens=64)
    return config, MuseGlimmerProcessor(images, MuseGlimmerVideoProcessor(), tokens)


VARIANT = Variant(
    make, template("<|patch|>", header("user"), header("assistant"), "<eos>", turn_end="<eos>"), marks=MARKS
)
