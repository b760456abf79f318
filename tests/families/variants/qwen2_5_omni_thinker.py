"""Qwen2.5-Omni's thinker: an audio tower stands beside the one for images."""

from transformers import (
    Qwen2_5OmniProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

from tests.families.variant import CHATML, ROPE, Made, Variant, chatml, config_of, text

from . import qwen2_5_vl

NAMED = {
    "image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>", "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}  # fmt: skip
AUDIO = {
    "d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "output_dim": 64,
    "num_mel_bins": 16, "n_window": 4,
}  # fmt: skip


def make(tokens) -> Made:
    names = {"image": "image", "audio": "audio", "video": "video"}
    config = config_of(
        "qwen2_5_omni_thinker", tokens, text_config=text(rope_parameters={**ROPE, "mrope_section": [8, 4, 4]}),
        vision_config=dict(qwen2_5_vl.VISION), audio_config=AUDIO,
        **{f"{kind}_token_id": getattr(tokens, f"{kind}_token_id") for kind in names},
        **{f"{kind}_token_index": getattr(tokens, f"{kind}_token_id") for kind in names},
        vision_start_token_id=tokens.vision_bos_token_id, vision_end_token_id=tokens.vision_eos_token_id,
        audio_start_token_id=tokens.audio_bos_token_id, audio_end_token_id=tokens.audio_eos_token_id,
    )  # fmt: skip
    sound = WhisperFeatureExtractor(feature_size=16)
    return config, Qwen2_5OmniProcessor(Qwen2VLImageProcessor(), Qwen2VLVideoProcessor(), sound, tokens)


VARIANT = Variant(make, chatml("<|vision_bos|><|IMAGE|><|vision_eos|>"), NAMED, CHATML, eos="<|endoftext|>")
