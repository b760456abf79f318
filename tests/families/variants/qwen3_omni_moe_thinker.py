"""Qwen3-Omni's thinker: experts, and an audio tower beside the one for images."""

from transformers import (
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3OmniMoeProcessor,
    WhisperFeatureExtractor,
)

from tests.families.variant import Made, Variant, config_of

from . import qwen2_5_omni_thinker, qwen3_vl, qwen3_vl_moe

AUDIO = {
    "d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "output_dim": 64,
    "num_mel_bins": 16, "n_window": 4, "downsample_hidden_size": 16,
}  # fmt: skip


def make(tokens) -> Made:
    config = config_of(
        "qwen3_omni_moe_thinker", tokens, text_config=dict(qwen3_vl_moe.DECODER),
        vision_config={**qwen3_vl.VISION, "deepstack_visual_indexes": [0]}, audio_config=AUDIO,
        **{f"{kind}_token_id": getattr(tokens, f"{kind}_token_id") for kind in ("image", "audio", "video")},
        vision_start_token_id=tokens.vision_bos_token_id, vision_end_token_id=tokens.vision_eos_token_id,
        audio_start_token_id=tokens.audio_bos_token_id,
    )  # fmt: skip
    sound = WhisperFeatureExtractor(feature_size=16)
    images, videos = Qwen2VLImageProcessor(patch_size=16), Qwen2VLVideoProcessor(patch_size=16)
    return config, Qwen3OmniMoeProcessor(images, videos, sound, tokens)


VARIANT = Variant(
    make, qwen2_5_omni_thinker.VARIANT.template, qwen2_5_omni_thinker.NAMED, qwen2_5_omni_thinker.VARIANT.marks,
    eos=qwen2_5_omni_thinker.VARIANT.eos,
)  # fmt: skip
