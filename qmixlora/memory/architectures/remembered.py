"""Facts of newer models, written from memory and not from the checkpoints' `config.json`, which could not be read here.

What transformers' configuration classes have as default is left out: it is the first checkpoint's. A model's
number of parameters, as it was published, agrees with these facts (a test says how closely); a number that does not
change it may be wrong, such as how many heads share a key. `qmixlora plan` reads the real `config.json` of a model
whose folder is named.
"""

from __future__ import annotations

from .parts import Facts, decoder, tower

ROPE: Facts = {"rope_type": "default", "rope_theta": 1e6}


def _qwen35_text(text: Facts, values: int, tied: bool) -> Facts:
    """Three layers in four have linear attention, with `values` heads."""
    rope = {
        "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    }  # fmt: skip
    return {
        **text, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": values,
        "tie_word_embeddings": tied, "rope_parameters": rope,
    }  # fmt: skip


def _qwen35(text: Facts, values: int, vision: tuple[int, int, int, int], tied: bool) -> Facts:
    """`vision`: width, inside, layers, heads."""
    width, inside, depth, heads = vision
    return {
        "model_type": "qwen3_5",
        "text_config": _qwen35_text(text, values, tied),
        "vision_config": {
            "depth": depth, "hidden_size": width, "intermediate_size": inside, "num_heads": heads,
            "out_hidden_size": text["hidden_size"],
        },
        "tie_word_embeddings": tied,
    }  # fmt: skip


def _internvl35(width: int, inside: int, layers: int, heads: int) -> Facts:
    """Qwen3 under InternViT-300M."""
    text = {**decoder("qwen3", width, inside, layers, heads, 8, 151936), "head_dim": 128, "rope_parameters": ROPE}
    return {
        "model_type": "internvl",
        "text_config": text,
        "vision_config": {**tower("internvl_vision", 1024, 4096, 24, 16, 448, 14), "attention_bias": True},
        "tie_word_embeddings": False,
    }


def _ministral3(width: int, inside: int, layers: int, tied: bool) -> Facts:
    text = {**decoder("ministral3", width, inside, layers, 32, 8, 131072), "head_dim": 128}
    return {
        "model_type": "mistral3",
        "text_config": {**text, "tie_word_embeddings": tied},
        "vision_config": {**tower("pixtral", 1024, 4096, 24, 16, 1540, 14), "head_dim": 64},
        "tie_word_embeddings": tied,
    }


def _glm4v(kind: str) -> Facts:
    """The class' own sizes; rotary positions in three directions."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}
    return {"model_type": kind, "text_config": {"model_type": "glm4v_text", "rope_parameters": rope}}


def _gemma4(text: Facts) -> Facts:
    """With an audio tower, and inputs of its own for every layer."""
    return {
        "model_type": "gemma4", "text_config": text, "vision_config": {"model_type": "gemma4_vision"},
        "audio_config": {"model_type": "gemma4_audio"},
    }  # fmt: skip


REMEMBERED: dict[str, Facts] = {
    "Qwen/Qwen3.5-0.8B": _qwen35(
        decoder("qwen3_5_text", 1024, 3584, 24, 8, 2, 248320), 16, (768, 3072, 12, 12), tied=True
    ),
    "Qwen/Qwen3.5-2B": _qwen35(
        decoder("qwen3_5_text", 2048, 6144, 24, 8, 2, 248320), 16, (1024, 4096, 24, 16), tied=True
    ),
    "Qwen/Qwen3.5-4B": _qwen35(
        decoder("qwen3_5_text", 2560, 9216, 32, 16, 4, 248320), 32, (1024, 4096, 24, 16), tied=True
    ),
    "Qwen/Qwen3.5-9B": _qwen35(
        decoder("qwen3_5_text", 4096, 12288, 32, 16, 4, 248320), 32, (1152, 4304, 27, 16), tied=False
    ),
    "Qwen/Qwen3.5-27B": _qwen35(
        decoder("qwen3_5_text", 5120, 17408, 64, 24, 4, 248320), 48, (1152, 4304, 27, 16), tied=False
    ),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": {
        "model_type": "qwen3_vl_moe",
        "text_config": {
            **decoder("qwen3_vl_moe_text", 2048, 6144, 48, 32, 4, 151936), "head_dim": 128, "num_experts": 128,
            "num_experts_per_tok": 8, "moe_intermediate_size": 768, "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 2048,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        "tie_word_embeddings": False,
    },
    "google/gemma-4-E2B-it": _gemma4(
        {
            **decoder("gemma4_text", 1536, 6144, 35, 8, 1, 262144), "num_kv_shared_layers": 20,
            "use_double_wide_mlp": True,
            "layer_types": ["full_attention" if index % 5 == 4 else "sliding_attention" for index in range(35)],
        }
    ),
    "google/gemma-4-E4B-it": _gemma4(
        {**decoder("gemma4_text", 2560, 10240, 42, 8, 2, 262144), "num_kv_shared_layers": 18}
    ),
    "google/gemma-4-31B-it": {
        "model_type": "gemma4",
        "text_config": {
            **decoder("gemma4_text", 5376, 21504, 60, 32, 16, 262144), "num_global_key_value_heads": 4,
            "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "sliding_window": 1024,
        },
        "vision_config": {
            "model_type": "gemma4_vision", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
            "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 72,
        },
    },
    "OpenGVLab/InternVL3_5-1B-HF": _internvl35(1024, 3072, 28, 16),
    "OpenGVLab/InternVL3_5-2B-HF": _internvl35(2048, 6144, 28, 16),
    "OpenGVLab/InternVL3_5-4B-HF": _internvl35(2560, 9728, 36, 32),
    "OpenGVLab/InternVL3_5-8B-HF": _internvl35(4096, 12288, 36, 32),
    "OpenGVLab/InternVL3_5-14B-HF": _internvl35(5120, 17408, 40, 40),
    "mistralai/Ministral-3-3B-Instruct-2512-BF16": _ministral3(3072, 9216, 26, tied=True),
    "mistralai/Ministral-3-8B-Instruct-2512-BF16": _ministral3(4096, 14336, 34, tied=False),
    "mistralai/Ministral-3-14B-Instruct-2512-BF16": _ministral3(5120, 16384, 40, tied=False),
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506": {"model_type": "mistral3", "tie_word_embeddings": False},
    "zai-org/GLM-4.1V-9B-Thinking": _glm4v("glm4v"),
    "zai-org/GLM-4.6V-Flash": _glm4v("glm46v"),
    "llava-hf/llava-v1.6-mistral-7b-hf": {
        "model_type": "llava_next",
        "text_config": {
            **decoder("mistral", 4096, 14336, 32, 32, 8, 32064), "rope_parameters": ROPE, "sliding_window": None,
        },
        "vision_config": tower("clip_vision_model", 1024, 4096, 24, 16, 336, 14),
    },
    "HuggingFaceM4/Idefics3-8B-Llama3": {
        "model_type": "idefics3",
        "text_config": {
            **decoder("llama", 4096, 14336, 32, 32, 8, 128259), "pad_token_id": 128002,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
        "vision_config": tower("idefics3_vision", 1152, 4304, 27, 16, 364, 14), "scale_factor": 2,
    },
    "LiquidAI/LFM2.5-VL-1.6B": {
        "model_type": "lfm2_vl",
        "text_config": {
            **decoder("lfm2", 2048, 12288, 16, 32, 8, 65536),
            "layer_types": [
                "full_attention" if index in (2, 5, 8, 10, 12, 14) else "conv" for index in range(16)
            ],
        },
        "vision_config": {
            **tower("siglip2_vision_model", 1152, 4304, 26, 16, 256, 16), "vision_use_head": False, "num_patches": 256,
        },
    },
    "openbmb/MiniCPM-V-4.6": {  # Qwen3.5-0.8B under SigLIP2-400M
        "model_type": "minicpmv4_6",
        "text_config": _qwen35_text(decoder("qwen3_5_text", 1024, 3584, 24, 8, 2, 248094), 16, tied=True),
        "vision_config": tower("minicpmv4_6_vision", 1152, 4304, 27, 16, 980, 14),
        "image_size": 1120, "image_token_id": 248056, "tie_word_embeddings": True,
    },
    "meta-llama/Llama-3.2-11B-Vision-Instruct": {
        "model_type": "mllama", "vision_config": {"image_size": 560}, "text_config": {"vocab_size": 128256},
    },
    "PaddlePaddle/PaddleOCR-VL": {
        "model_type": "paddleocr_vl",
        "text_config": {
            "model_type": "paddleocr_vl_text", "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [16, 24, 24]},
        },
        "tie_word_embeddings": False,
    },
}  # fmt: skip
