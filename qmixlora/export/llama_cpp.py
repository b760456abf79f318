"""LoRA files for llama.cpp: GGUF, its tensors as llama.cpp's own converter (`convert_lora_to_gguf.py`) makes them.

Shapes: K rank, O out-features, H heads, D width of a head.

llama.cpp knows one alpha per file, and scales every tensor by it over the tensor's own rank: layers of two ranks in one
file would be applied at two scales, and no one told. So the alpha is not given but made of the file's one rank.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from qmixlora.errors import UserError

from .low_rank import LowRank

PACKAGE = "gguf"
INSTALL = "pip install 'qmixlora[gguf]'"
ARCHITECTURES = {  # of llama.cpp, by the model type of the language model
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen2_vl_text": "qwen2vl",
    "qwen2_5_vl_text": "qwen2vl",
    "qwen3": "qwen3",
    "qwen3_vl_text": "qwen3vl",
    "gemma3_text": "gemma3",
}
INTERLEAVED = {"llama"}  # whose rotary halves llama.cpp has side by side, so that rows of q and k change places
# model types of which its converter makes a file for images (`--mmproj`), each seen to
WITH_IMAGES = {"gemma3", "idefics3", "janus", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm"}
LAYERS = "layers."  # in a path, before the number of a decoder's layer


@dataclass(frozen=True)
class LlamaModel:
    """A language model as llama.cpp has it: its architecture there, layers, heads, and heads of keys and values."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int

    @staticmethod
    def of(config: Any) -> LlamaModel:
        """The language model in a transformers config.

        Raises:
            UserError: llama.cpp has none of its kind, or none that was compared; the package `gguf` is not installed.
        """
        text = config.get_text_config()
        if text.model_type not in ARCHITECTURES:
            known = ", ".join(dict.fromkeys(ARCHITECTURES))
            raise UserError(
                f"LoRA files for llama.cpp are not made for language models of type {text.model_type!r}.",
                where=f"--as gguf: {type(config).__name__}",
                fix=f"Those made are compared with llama.cpp's converter: {known}. Export --as lora and convert that.",
            )
        if importlib.util.find_spec(PACKAGE) is None:
            raise UserError("Files for llama.cpp need the package gguf, which is not installed.", fix=INSTALL)
        heads = int(text.num_attention_heads)
        kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
        return LlamaModel(ARCHITECTURES[text.model_type], int(text.num_hidden_layers), heads, kv_heads)

    def write_lora(
        self, path: Path, updates: Mapping[str, LowRank], task: str, name: str, scaling: float = 1.0
    ) -> None:
        """Write the updates of the language model's layers, by their paths in the model, as one GGUF LoRA in fp32.

        `scaling` is what llama.cpp multiplies the updates with where a request gives the scale 1.

        Raises:
            UserError: llama.cpp has no place for a layer.
            ValueError: the updates have not all the same rank.
        """
        import gguf

        ranks = {update.rank for update in updates.values()}
        if len(ranks) != 1:
            raise ValueError(f"One file has one rank, and these updates have {sorted(ranks)}.")
        writer = gguf.GGUFWriter(path, self.architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_name(name)
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scaling * ranks.pop())
        writer.add_string(gguf.Keys.Adapter.LORA_TASK_NAME, task)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for layer, update in updates.items():
            own = self._name(layer)
            writer.add_tensor(f"{own}.lora_a", _as_array(update.down_KI))
            writer.add_tensor(f"{own}.lora_b", self._rows(layer, _as_array(update.up_OK)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _name(self, layer: str) -> str:
        """The name of a layer's weight in llama.cpp. Raises UserError if it has none."""
        _, within, rest = layer.partition(LAYERS)
        key = f"model.{within}{rest}.weight" if within else f"{layer}.weight"
        own: str | None = _names(self.architecture, self.layers).get_name(key, try_suffixes=(".weight",))
        if own is None:
            raise UserError(
                f"llama.cpp has no place for an update of {layer}.",
                where="--as gguf",
                fix="Train with adapter.target_modules that it has, or export --as merged.",
            )
        return own

    def _rows(self, layer: str, up_OK: Any) -> Any:
        """B with its rows in llama.cpp's order: the two halves of each head's rotary positions side by side."""
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(layer.rpartition(".")[2])
        if heads is None or self.architecture not in INTERLEAVED:
            return up_OK
        up_H2DK = up_OK.reshape(heads, 2, len(up_OK) // heads // 2, -1)
        return np.ascontiguousarray(up_H2DK.swapaxes(1, 2).reshape(up_OK.shape))


@cache
def _names(architecture: str, layers: int) -> Any:
    """The names of tensors in llama.cpp; a table that takes longer to make than a file to write."""
    import gguf

    known = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    return gguf.get_tensor_name_map(known, layers)


def note_on_images(config: Any) -> str:
    """How llama.cpp sees images with a model, or that its converter has no file for that."""
    if config.model_type in WITH_IMAGES:
        return "For images, llama.cpp wants a second file, of the base: python convert_hf_to_gguf.py --mmproj BASE."
    encoder = getattr(getattr(config, "vision_config", None), "model_type", "its image encoder")
    return (
        f"llama.cpp's converter makes no file for images of {config.model_type} with {encoder}: questions without an "
        "image alone are answered there."
    )


def _as_array(tensor: Tensor) -> Any:
    return tensor.detach().float().cpu().contiguous().numpy()
