"""Models that can be planned before anything is downloaded: the facts of their configurations that decide sizes."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from qmixlora.errors import UserError
from qmixlora.recipe import Model

_CLIP_LARGE = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip


def _vicuna(width: int, inside: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": width, "intermediate_size": inside, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 32064,
    }  # fmt: skip


def _qwen(width: int, inside: int, layers: int, heads: int, vision_inside: int, small: bool = False) -> dict[str, Any]:
    """Qwen2.5-VL; the small one has fewer key-value heads and its embeddings tied to lm_head."""
    return {
        "model_type": "qwen2_5_vl",
        "text_config": {
            "hidden_size": width, "intermediate_size": inside, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": 2 if small else 8 if heads == 40 else 4,
            "vocab_size": 151936 if small else 152064, "tie_word_embeddings": small,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": vision_inside, "num_heads": 16,
            "out_hidden_size": width, "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "tie_word_embeddings": small,
    }  # fmt: skip


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llava-hf/llava-1.5-7b-hf": {
        "model_type": "llava", "text_config": _vicuna(4096, 11008, 32, 32), "vision_config": _CLIP_LARGE,
    },
    "llava-hf/llava-1.5-13b-hf": {
        "model_type": "llava", "text_config": _vicuna(5120, 13824, 40, 40), "vision_config": _CLIP_LARGE,
    },
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen(2048, 11008, 36, 16, 3420, small=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen(3584, 18944, 28, 28, 3420),
    "Qwen/Qwen2.5-VL-32B-Instruct": _qwen(5120, 27648, 64, 40, 3456),
}  # fmt: skip


def config_of(spec: Model) -> PretrainedConfig:
    """The configuration of a recipe's model: from the table, a local folder, or the hub.

    Raises:
        UserError: it is in none of them.
    """
    if spec.id in ARCHITECTURES:
        facts = dict(ARCHITECTURES[spec.id])
        return CONFIG_MAPPING[facts.pop("model_type")](**facts)
    try:
        return AutoConfig.from_pretrained(spec.id, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The model's configuration cannot be read: {error}",
            where=f"model.id: {spec.id}",
            fix=f"Give a local folder, be online once, or use one of: {', '.join(ARCHITECTURES)}.",
        ) from error
