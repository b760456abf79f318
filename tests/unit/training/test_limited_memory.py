"""Memory that really runs out, in a process that gets no more than half a GiB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qmixlora.recipe import Recipe, load_recipe

from .card import records

SECOND = 0  # a seed with which sample 0 of 32 comes in the second half
LIMITED = """
import resource
import torch
from qmixlora.training import train_within_memory  # what a run needs besides its tensors is loaded first
x = torch.ones(1, 300, 300, requires_grad=True)
for work in (lambda: x @ x, lambda: torch.bmm(x, x), x.exp, x.log, x.sin, x.cos, x.tanh, x.erf, x.sigmoid, x.rsqrt):
    work().sum().backward()  # MKL, which ends the process where it cannot load its kernels
with open("/proc/self/status") as status:
    held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
resource.setrlimit(resource.RLIMIT_DATA, (held + 500 * 2**20,) * 2)
from qmixlora.cli.main import run
run()
"""


@pytest.mark.long
def test_memory_that_really_runs_out(make_recipe: Callable[..., Recipe], data: Path, tmp_path: Path) -> None:
    """A long sample in the second step: attention of 16 x 1,000 x 1,000 and more does not fit in half a GiB."""
    samples = json.loads((data / "train.json").read_text())[:32]
    for sample in samples:
        sample["image"] = str(data / sample["image"])
    samples[0]["conversations"][0]["value"] += " what digit is written ?" * 190
    path = tmp_path / "long.json"
    path.write_text(json.dumps(samples))
    recipe = make_recipe(
        model={"attention": "eager"},
        data={"train": str(path), "allow_outside": True, "max_length": 2048},
        train={"micro_batch_size": 16, "max_steps": 2, "seed": SECOND},
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        # threads have stacks, and one is started for every core: one core here
        **dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "ARROW_IO_THREADS"), "1"),
        "MALLOC_ARENA_MAX": "1",
        "COLUMNS": "200",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", LIMITED, "train", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the last completed step is 1. Going on from step 1 with train.micro_batch_size=8" in done.stdout
    spec = load_recipe(str(tmp_path / "run" / "recipe.yaml")).train
    assert spec.micro_batch_size < 16 and spec.micro_batch_size * spec.gradient_accumulation == 16
    written = (
        f"train:\n  micro_batch_size: {spec.micro_batch_size}\n  gradient_accumulation: {16 // spec.micro_batch_size}"
    )
    assert written in done.stdout
    assert next(r["step"] for r in records(tmp_path / "run") if "out_of_memory" in r) == 1
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
