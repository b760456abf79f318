"""Video-LLaVA, on images: a tower for images beside one for videos."""

from transformers import VideoLlavaImageProcessor, VideoLlavaProcessor, VideoLlavaVideoProcessor

from tests.families.variant import Made, Variant, config_of, text, vision

from . import llava


def make(tokens) -> Made:
    config = config_of(
        "video_llava", tokens, text_config=text("llama"), vision_config=vision("clip_vision_model"),
        image_token_index=tokens.image_token_id, video_token_index=tokens.video_token_id, image_seq_length=16,
    )  # fmt: skip
    images = VideoLlavaImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return config, VideoLlavaProcessor(
        images,
        VideoLlavaVideoProcessor(),
        tokens,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


VARIANT = Variant(
    make, llava.VARIANT.template, named={"image_token": "<image>", "video_token": "<video>"}, bos="<s>", eos="</s>"
)
