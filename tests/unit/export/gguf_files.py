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
from qmixlora.export.llama_cpp import LlamaModel
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


def write_base(folder: Path, path: Path) -> Path:
    """The text part of a small Llama in a checkpoint folder as a GGUF file in fp32, with a name for every token."""
    import gguf

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    config = model.config.get_text_config()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    llama, writer = LlamaModel.of(model.config), gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("bert")  # which knows unknown words
    for name in ("bos", "eos", "unk", "sep", "pad", "mask"):
        getattr(writer, f"add_{name}_token_id")(0)
    writer.add_token_list([f"<0x{token:02X}>" for token in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * config.vocab_size)
    decoder = model.get_decoder()
    weights = {f"model.{name}": value for name, value in decoder.state_dict().items()}
    for name, value in {**weights, "lm_head.weight": model.get_output_embeddings().weight}.items():
        array = value.detach().float().numpy()
        array = llama._rows(name.removesuffix(".weight"), array)  # which llama.cpp's converter does to q and k
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


NODE = Path(os.environ.get("NODE_LLAMA_CPP", "node_modules")) / "node-llama-cpp"
ASK = """
import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";
const {binding, base, jobs} = JSON.parse(readFileSync(0, "utf8"));
const {getLlama} = await import(pathToFileURL(binding + "/dist/index.js"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const model = await llama.loadModel({modelPath: base});
const answers = [];
for (const {prompt, adapters, count} of jobs) {
    const exact = {experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32", flashAttention: false};
    const context = await model.createContext({contextSize: 512, threads: 1, lora: {adapters}, ...exact});
    const tokens = [], logprobs = [];
    const greedy = {temperature: 0, yieldEogToken: true};
    const steps = context.getSequence().evaluateWithMetadata(prompt, {confidence: true}, greedy);
    for await (const {token, confidence} of steps) {
        tokens.push(token);
        logprobs.push(Math.log(confidence));
        if (tokens.length >= count) break;
    }
    answers.push({tokens, logprobs});
    await context.dispose();
}
console.log(JSON.stringify(answers));
process.exit(0);
"""


def asked_llama_cpp(base: Path, jobs: list[dict[str, Any]]) -> list[dict[str, list[float]]]:
    """The greedy tokens, with their log-probabilities, that llama.cpp answers prompts with through its binding for
    Node; a job has `prompt` (tokens), `adapters` (`filePath`, `scale`) and `count`, of tokens.
    """
    script = base.with_name("ask.mjs")
    script.write_text(ASK, encoding="utf-8")
    given = json.dumps({"binding": str(NODE.resolve()), "base": str(base), "jobs": jobs})
    done = subprocess.run(["node", str(script)], input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


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
