"""Facts of the checkpoints' own `config.json`; what transformers' configuration classes have as default is left out."""

from __future__ import annotations

from .parts import Facts, decoder, tower


def _llava(width: int, inside: int, layers: int, heads: int) -> Facts:
    return {
        "model_type": "llava",
        "text_config": decoder("llama", width, inside, layers, heads, heads, 32064),
        "vision_config": tower("clip_vision_model", 1024, 4096, 24, 16, 336, 14),
    }


def _llava_onevision(text: Facts, tied: bool) -> Facts:
    """Its tower is SigLIP without the last layer and the pooling head."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return {
        "model_type": "llava_onevision",
        "text_config": {**text, "rope_parameters": rope, "tie_word_embeddings": tied},
        "vision_config": {**tower("siglip_vision_model", 1152, 4304, 26, 16, 384, 14), "vision_use_head": False},
        "tie_word_embeddings": tied,
    }


def _qwen25_vl(text: Facts, vision_inside: int, tied: bool) -> Facts:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return {
        "model_type": "qwen2_5_vl",
        "text_config": {**text, "rope_parameters": rope, "tie_word_embeddings": tied},
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": vision_inside, "num_heads": 16,
            "out_hidden_size": text["hidden_size"], "patch_size": 14, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "tie_word_embeddings": tied,
    }  # fmt: skip


def _qwen3_vl(text: Facts, tied: bool) -> Facts:
    """The small ones (2B, 4B) have their embeddings tied to lm_head, and a smaller vision tower."""
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    small: Facts = {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17],
    }  # fmt: skip
    large: Facts = {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24],
    }  # fmt: skip
    return {
        "model_type": "qwen3_vl",
        "text_config": {**text, "head_dim": 128, "rope_parameters": rope, "tie_word_embeddings": tied},
        "vision_config": {**(small if tied else large), "num_heads": 16, "out_hidden_size": text["hidden_size"]},
        "tie_word_embeddings": tied,
    }


def _gemma3(text: Facts, head: int, query_scale: int) -> Facts:
    """Five layers in six look back over 1,024 tokens; the sixth over all, with its positions stretched eightfold."""
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    }
    return {
        "model_type": "gemma3",
        "text_config": {
            **text, "head_dim": head, "query_pre_attn_scalar": query_scale, "sliding_window": 1024,
            "rope_parameters": rope,
        },
        "vision_config": {**tower("siglip_vision_model", 1152, 4304, 27, 16, 896, 14), "vision_use_head": False},
    }  # fmt: skip


def _internvl3(width: int, inside: int, layers: int, heads: int, kv_heads: int) -> Facts:
    """Qwen2.5 under InternViT-300M."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return {
        "model_type": "internvl",
        "text_config": {**decoder("qwen2", width, inside, layers, heads, kv_heads, 151674), "rope_parameters": rope},
        "vision_config": {
            **tower("internvl_vision", 1024, 4096, 24, 16, 448, 14), "attention_bias": True,
        },
        "tie_word_embeddings": False,
    }  # fmt: skip


def _smolvlm2(text: Facts, rope_theta: float, vision: Facts, scale: int) -> Facts:
    return {
        "model_type": "smolvlm",
        "text_config": {
            **text, "head_dim": 64, "rms_norm_eps": 1e-5, "pad_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        },
        "vision_config": vision, "scale_factor": scale, "image_token_id": 49190, "tie_word_embeddings": False,
    }  # fmt: skip


PUBLISHED: dict[str, Facts] = {
    "llava-hf/llava-1.5-7b-hf": _llava(4096, 11008, 32, 32),
    "llava-hf/llava-1.5-13b-hf": _llava(5120, 13824, 40, 40),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": _llava_onevision(
        decoder("qwen2", 896, 4864, 24, 14, 2, 152000), tied=True
    ),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": _llava_onevision(
        decoder("qwen2", 3584, 18944, 28, 28, 4, 152128), tied=False
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen25_vl(
        decoder("qwen2_5_vl_text", 2048, 11008, 36, 16, 2, 151936), 3420, tied=True
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen25_vl(
        decoder("qwen2_5_vl_text", 3584, 18944, 28, 28, 4, 152064), 3420, tied=False
    ),
    "Qwen/Qwen2.5-VL-32B-Instruct": _qwen25_vl(
        decoder("qwen2_5_vl_text", 5120, 27648, 64, 40, 8, 152064), 3456, tied=False
    ),
    "Qwen/Qwen3-VL-2B-Instruct": _qwen3_vl(decoder("qwen3_vl_text", 2048, 6144, 28, 16, 8, 151936), tied=True),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3_vl(decoder("qwen3_vl_text", 2560, 9728, 36, 32, 8, 151936), tied=True),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3_vl(decoder("qwen3_vl_text", 4096, 12288, 36, 32, 8, 151936), tied=False),
    "Qwen/Qwen3-VL-32B-Instruct": _qwen3_vl(decoder("qwen3_vl_text", 5120, 25600, 64, 64, 8, 151936), tied=False),
    "google/gemma-3-4b-it": _gemma3(decoder("gemma3_text", 2560, 10240, 34, 8, 4, 262208), 256, 256),
    "google/gemma-3-12b-it": _gemma3(decoder("gemma3_text", 3840, 15360, 48, 16, 8, 262208), 256, 256),
    "google/gemma-3-27b-it": _gemma3(decoder("gemma3_text", 5376, 21504, 62, 32, 16, 262208), 128, 168),
    "OpenGVLab/InternVL3-1B-hf": _internvl3(896, 4864, 24, 14, 2),
    "OpenGVLab/InternVL3-2B-hf": _internvl3(1536, 8960, 28, 12, 2),
    "OpenGVLab/InternVL3-8B-hf": _internvl3(3584, 18944, 28, 28, 4),
    "OpenGVLab/InternVL3-14B-hf": _internvl3(5120, 13824, 48, 40, 8),
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": _smolvlm2(
        decoder("llama", 960, 2560, 32, 15, 5, 49280), 1e5,
        tower("smolvlm_vision", 768, 3072, 12, 12, 512, 16), scale=4,
    ),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": _smolvlm2(
        decoder("llama", 2048, 8192, 24, 32, 32, 49280), 130000.0,
        tower("smolvlm_vision", 1152, 4304, 27, 16, 384, 14), scale=3,
    ),
}  # fmt: skip
