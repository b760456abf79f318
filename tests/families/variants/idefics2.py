"""Idefics2: a perceiver reads images of any shape."""

from transformers import Idefics2ImageProcessor, Idefics2Processor

from tests.families.variant import Made, Variant, config_of, template, text, vision


def make(tokens) -> Made:
    config = config_of(
        "idefics2", tokens, text_config=text("mistral"), vision_config=vision(),
        perceiver_config={
            "hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
            "resampler_head_dim": 32, "num_key_value_heads": 1,
        },
        image_token_id=tokens.image_token_id,
    )  # fmt: skip
    images = Idefics2ImageProcessor(size={"shortest_edge": 14, "longest_edge": 28}, do_image_splitting=False)
    return config, Idefics2Processor(images, tokens, image_seq_len=4)


END = "<end_of_utterance>\n"
VARIANT = Variant(
    make, template("<image>", "User:", "Assistant: ", END, turn_end=END, bos="<s>"),
    named={"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>"}, 
    marks=("<end_of_utterance>",), bos="<s>", eos="</s>",
)  # fmt: skip
