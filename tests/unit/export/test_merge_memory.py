"""The memory of merging, on a checkpoint that is larger than what merging may take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from .helpers import in_its_own_process

MEASURE = """
import json, sys, threading, time, torch
from pathlib import Path
from qmixlora.export.low_rank import LowRank
from qmixlora.export.merge import Merge, nf4_round_trip
from qmixlora.export.static import StaticAdapter
from qmixlora.recipe import Model
folder, out, base = sys.argv[1:4]
O, I, layers = 8192, 14336, 3
updates = {
    f"model.language_model.layers.{n}.mlp.down_proj": LowRank(torch.randn(16, I) * 0.01, torch.randn(O, 16) * 0.01)
    for n in range(layers)
}
nf4_round_trip(torch.randn(256, 256).bfloat16(), torch.bfloat16, torch.device("cpu"))
seen, done = [], threading.Event()

def held():  # what is the process's own: pages of the checkpoint that are mapped come and go as the system likes
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def watch():
    while not done.is_set():
        seen.append(held())
        time.sleep(0.005)

idle, watcher = held(), threading.Thread(target=watch)
watcher.start()
Merge(StaticAdapter(updates, {}), Model(id=folder), base).write(Path(out))
done.set()
watcher.join()
print(json.dumps({"idle": idle, "peak": max(seen), "samples": len(seen), "largest": O * I * 2 / 2**20}))
"""


@pytest.mark.long
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path, processor: Any) -> None:
    """Merging a checkpoint of 2.1 GB in one shard stays under its largest tensor plus 200 MiB: into NF4, which
    takes all that the original weights take and the round trip.
    """
    source, merged = big_checkpoint(tmp_path / "big", processor) / "model.safetensors", tmp_path / "merged"
    size = source.stat().st_size
    assert size > 2e9
    memory = in_its_own_process(MEASURE, source.parent, merged, "nf4")
    longer = (merged / "model.safetensors").stat().st_size - size  # by the names that the tower has on the hub
    assert 0 < longer < 1000
    for path in (source, merged / "model.safetensors"):
        path.unlink()
    assert memory["samples"] > 100
    assert memory["largest"] < memory["peak"] - memory["idle"] < memory["largest"] + 200, memory


def big_checkpoint(folder: Path, processor: Any) -> Path:
    """A LLaVA with three wide layers (zeros, written without ever being in memory)."""
    from transformers import LlavaForConditionalGeneration

    from qmixlora.demo.backbone import make_config

    config = make_config(processor.tokenizer, layers=3, width=64)
    text = config.text_config
    text.hidden_size, text.intermediate_size = 8192, 14336
    text.head_dim, text.num_attention_heads, text.num_key_value_heads = 64, 1, 1
    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = LlavaForConditionalGeneration(config).state_dict()
    described: dict[str, Any] = {}
    offset = 0
    for name, tensor in state.items():
        length = tensor.numel() * 2
        described[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, offset + length]}
        offset += length
    header = json.dumps(described).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + offset)
    return folder
