"""GGUF files in tests: what is in one, LoRAs to write, and llama.cpp's own converter where it is installed.

LLAMA_CPP names a checkout of llama.cpp (its Python part is enough: a source distribution of llama-cpp-python has it in
vendor/llama.cpp). `python -m tests.unit.export.gguf_files` prints the digests of its converter's LoRAs.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from qmixlora.backbone import find_anatomy
from qmixlora.export.low_rank import LowRank
from tests.families.variant import variants

RANK = 3
KINDS = {  # llama.cpp's architecture -> a variant that has a language model of its kind
    "llama": "llava",
    "qwen2": "llava_onevision",
    "qwen2vl": "qwen2_5_vl",
    "qwen3": "internvl3_5",
    "qwen3vl": "qwen3_vl",
    "gemma3": "gemma3",
}


def tensors_of(path: Path) -> dict[str, Any]:
    """The tensors of a GGUF file."""
    import gguf

    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def facts_of(path: Path) -> dict[str, Any]:
    """The keys and values of a GGUF file."""
    import gguf

    fields = gguf.GGUFReader(path).fields.values()
    return {field.name: field.contents() for field in fields if not field.name.startswith("GGUF.")}


def digest_of(path: Path) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of a file's tensors."""
    digest = hashlib.sha256()
    for name, array in sorted(tensors_of(path).items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def made_up(architecture: str) -> tuple[Any, dict[str, LowRank]]:
    """(the config of a tiny model with a language model of this kind, updates of all its layers): exact numbers, the
    same on every machine.
    """
    config, _ = variants()[KINDS[architecture]].build()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    updates, start = {}, 0
    for layer in find_anatomy(model).targets:
        out_features, in_features = model.get_submodule(layer).weight.shape
        down, start = _numbers(RANK, in_features, start)
        up, start = _numbers(out_features, RANK, start)
        updates[layer] = LowRank(down, up)
    return config, updates


def _numbers(rows: int, columns: int, start: int) -> tuple[torch.Tensor, int]:
    numbers = torch.arange(start, start + rows * columns, dtype=torch.int64)
    return ((numbers * 7919 % 4093).float() / 4096 - 0.5).view(rows, columns), start + rows * columns


def converter() -> Path | None:
    """llama.cpp's converter of LoRAs, where it is installed."""
    script = Path(os.environ.get("LLAMA_CPP", "")) / "convert_lora_to_gguf.py"
    return script if os.environ.get("LLAMA_CPP") and script.is_file() else None


def converted(architecture: str, folder: Path) -> Path:
    """The file that llama.cpp's converter makes of the same LoRA, as PEFT saves it."""
    config, updates = made_up(architecture)
    model, adapter, out = folder / "model", folder / "adapter", folder / "converted.gguf"
    adapter.mkdir(parents=True)
    config.architectures = [AutoModelForImageTextToText._model_mapping[type(config)].__name__]
    config.get_text_config().architectures = CAUSAL.get(architecture)
    config.save_pretrained(model)
    LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(updates)).save_pretrained(adapter)
    weights = {}
    for layer, update in updates.items():
        weights[f"base_model.model.{layer}.lora_A.weight"] = update.down_KI
        weights[f"base_model.model.{layer}.lora_B.weight"] = update.up_OK.contiguous()
    save_file(weights, adapter / "adapter_model.safetensors")
    command = [sys.executable, str(converter()), "--base", str(model), "--outfile", str(out), str(adapter)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


# as the hub's checkpoints name the language model of a model that llama.cpp's converter does not know as a whole
CAUSAL = {"llama": ["LlamaForCausalLM"], "qwen2": ["Qwen2ForCausalLM"], "qwen3": ["Qwen3ForCausalLM"]}


if __name__ == "__main__":
    digests = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as scratch:
            digests[kind] = digest_of(converted(kind, Path(scratch)))
    print(json.dumps(digests, indent=2))
