"""HyperCLOVA X Vision: Qwen2.5-VL's tower under a decoder of its own."""

from transformers import HyperCLOVAXVisionV2Processor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from tests.families.variant import Made, Variant, config_of, text

from . import qwen2_5_vl, qwen2_vl


def make(tokens) -> Made:
    config = config_of(
        "hyperclovax_vision_v2", tokens, text_config=text("hyperclovax"),
        vision_config={"model_type": "qwen2_5_vl_vision", **qwen2_5_vl.VISION},
        image_token_id=tokens.image_token_id, video_token_id=tokens.video_token_id,
    )  # fmt: skip
    return config, HyperCLOVAXVisionV2Processor(Qwen2VLImageProcessor(), tokens, Qwen2VLVideoProcessor())


VARIANT = Variant(
    make, qwen2_vl.VARIANT.template, qwen2_vl.VARIANT.named, qwen2_vl.VARIANT.marks, eos=qwen2_vl.VARIANT.eos
)
