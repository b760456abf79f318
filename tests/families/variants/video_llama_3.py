"""VideoLLaMA 3, on images."""

from transformers import VideoLlama3ImageProcessor, VideoLlama3Processor, VideoLlama3VideoProcessor

from tests.families.variant import CHATML, Made, Variant, chatml, config_of, text


def make(tokens) -> Made:
    config = config_of(
        "video_llama_3", tokens, text_config=text("qwen2"),
        vision_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "patch_size": 14,
        },
        image_token_id=tokens.image_token_id, video_token_id=tokens.video_token_id,
    )  # fmt: skip
    return config, VideoLlama3Processor(VideoLlama3ImageProcessor(), tokens, VideoLlama3VideoProcessor())


VARIANT = Variant(
    make, chatml("<image>\n"), named={"image_token": "<image>", "video_token": "<video>"}, marks=CHATML,
    eos="<|endoftext|>", refused={"plan tokens": "do not hold an image"},
)  # fmt: skip
