"""Gemma 4, large: no inputs of its own for a layer; images keep their shape."""

from transformers import Gemma4AudioFeatureExtractor, Gemma4ImageProcessor, Gemma4Processor, Gemma4VideoProcessor

from tests.families.variant import Made, Variant, config_of, template, text


def make(tokens, **decoder) -> Made:
    facts = {"rope_parameters": None, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 384, **decoder}
    config = config_of(
        "gemma4", tokens,
        text_config=text(**facts, layer_types=["sliding_attention", "full_attention"], global_head_dim=32),
        vision_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 32, "patch_size": 4, "position_embedding_size": 64,
        },
        audio_config=None, image_token_id=tokens.image_token_id, boi_token_id=tokens.boi_token_id,
        eoi_token_id=tokens.eoi_token_id, video_token_id=tokens.convert_tokens_to_ids("<|video|>"),
        audio_token_id=tokens.audio_token_id, boa_token_id=tokens.boa_token_id, eoa_token_index=tokens.eoa_token_id,
    )  # fmt: skip
    images = Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70)
    return config, Gemma4Processor(
        Gemma4AudioFeatureExtractor(), images, tokens, Gemma4VideoProcessor(patch_size=4), image_seq_length=70
    )


END = "<turn|>\n"
VARIANT = Variant(
    make, template("<|image|>", "<|turn>user\n", "<|turn>model\n", END, turn_end=END, bos="<bos>"),
    named={
        "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>",
        "boa_token": "<|audio>", "eoa_token": "<audio|>",
    },
    marks=("<|turn>", "<turn|>", "<|video|>"),
)  # fmt: skip
