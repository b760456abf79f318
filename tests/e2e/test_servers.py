"""benchmarks/servers.py with a tiny model in a real llama-server, where LLAMA_CPP names a checkout with it built."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SERVERS = Path(__file__).parents[2] / "benchmarks" / "servers.py"
BUILT = Path(os.environ.get("LLAMA_CPP", "")) / "build" / "bin" / "llama-server"
TINY = "llama-server--qwen2.5-vl--gguf--float32"
REASONS = {
    "adapter dropped": "as the base without it",
    "another alpha": "another scale",
    "another base": "The base below the adapter is another one",
    "another chat template": "Another chat template",
    "cached prompts": "",
    "fewer bits": "in fewer bits",
    "images of another size": "Images of another size",
    "projector dropped": "without its projector",
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("servers")
    command = [sys.executable, str(SERVERS), "run", TINY, "--to", str(folder / "results")]
    own = {**os.environ, "QMIXLORA_SERVERS": str(folder)}
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {path.stem: json.loads(path.read_text()) for path in (folder / "results").glob("*.json")}


@pytest.mark.long
@pytest.mark.skipif(not os.environ.get("LLAMA_CPP") or not BUILT.is_file(), reason="LLAMA_CPP has no llama-server")
def test_llama_server_answers_as_the_exports_and_is_told_from_broken_ones(measured: dict[str, Any]) -> None:
    right = measured[TINY]
    assert right["check"]["a-gguf"] == "applied"
    for image in ("none", "40x40", "28x56"):  # whose shape whole tokens have; llama.cpp pads others
        own = right["by_image"][image]
        assert own["same"] == own["prompts"] > 0 and own["largest_difference"] < 2e-3, image
    broken = {name: one for name, one in measured.items() if name.startswith(f"{TINY}--")}
    said = {name.removeprefix(f"{TINY}--").replace("_", " "): one for name, one in broken.items()}
    assert set(said) == set(REASONS)
    for name, words in REASONS.items():
        assert said[name]["exit"] == 1 and words in " ".join(said[name]["reasons"]), name
