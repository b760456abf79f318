"""Gemma 3n: every layer has inputs of its own; a tower of timm's, and one for audio."""

import pytest
from transformers import Gemma3nAudioFeatureExtractor, Gemma3nProcessor, SiglipImageProcessor

from tests.families.variant import Made, Variant, config_of, text

from . import gemma3

NAMED = {**gemma3.VARIANT.named, "audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>",
         "eoa_token": "<end_of_audio>"}  # fmt: skip


def make(tokens) -> Made:
    pytest.importorskip("timm")
    config = config_of(
        "gemma3n", tokens,
        text_config=text(
            rope_parameters=None, num_hidden_layers=3, layer_types=["sliding_attention", "full_attention"] + ["sliding_attention"],
            num_kv_shared_layers=0, hidden_size_per_layer_input=64, vocab_size_per_layer_input=384, laurel_rank=64,
            altup_num_inputs=2, activation_sparsity_pattern=0.0,
        ),
        vision_config={"architecture": "mobilenetv5_base", "hidden_size": 2048, "vocab_offset": 384, "vocab_size": 1},
        audio_config={"vocab_offset": 385, "vocab_size": 1, "hidden_size": 64, "conf_num_hidden_layers": 1,
                      "conf_num_attention_heads": 2},
        vision_soft_tokens_per_image=256,
        **{f"{name}_id": getattr(tokens, f"{name}_id") for name in NAMED},
    )  # fmt: skip
    images = SiglipImageProcessor(size={"height": 256, "width": 256})
    return config, Gemma3nProcessor(Gemma3nAudioFeatureExtractor(), images, tokens, image_seq_length=256)


VARIANT = Variant(make, gemma3.VARIANT.template, named=NAMED, marks=gemma3.VARIANT.marks)
