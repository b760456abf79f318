"""Parts that the tables of configurations share."""

from __future__ import annotations

from typing import Any

Facts = dict[str, Any]


def decoder(kind: str, width: int, inside: int, layers: int, heads: int, kv_heads: int, words: int) -> Facts:
    """A text_config."""
    return {
        "model_type": kind, "hidden_size": width, "intermediate_size": inside, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": words,
    }  # fmt: skip


def tower(kind: str, width: int, inside: int, layers: int, heads: int, size: int, patch: int) -> Facts:
    """A vision_config, for images (or tiles) of one size in pixels."""
    return {
        "model_type": kind, "hidden_size": width, "intermediate_size": inside, "num_hidden_layers": layers,
        "num_attention_heads": heads, "image_size": size, "patch_size": patch,
    }  # fmt: skip
