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


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llava-hf/llava-1.5-7b-hf": {
        "model_type": "llava", "text_config": _vicuna(4096, 11008, 32, 32), "vision_config": _CLIP_LARGE,
    },
    "llava-hf/llava-1.5-13b-hf": {
        "model_type": "llava", "text_config": _vicuna(5120, 13824, 40, 40), "vision_config": _CLIP_LARGE,
    },
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
