"""Words that the exporter's tests share: a run's rows, a model's logits, a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from qmixlora.data import indices_by_task, load_split
from qmixlora.export import Fidelity, Request, export
from qmixlora.export.low_rank import LowRank
from qmixlora.recipe import Edit, Recipe, load_recipe
from qmixlora.session import Session

QUIET = Console(quiet=True)
TASKS = ("color", "count")
Q_PROJ = "model.language_model.layers.0.self_attn.q_proj"
MODEL_INPUTS = ("input_ids", "attention_mask", "pixel_values")


def exported(run: Path, **request: Any) -> Fidelity:
    """Export a run as the one folder that is asked for; `color` unless said otherwise."""
    (fidelity,) = export(run, Request(**{"tasks": ("color",), "fingerprint": False, **request}), QUIET)
    return fidelity


def recipe_of(run: Path) -> Recipe:
    return load_recipe(str(run / "recipe.yaml"))


def edit_recipe(run: Path, **changes: Any) -> None:
    """Change a run's recipe; `export__polish=3` sets `export.polish`."""
    edit = Edit({name.replace("__", "."): value for name, value in changes.items()})
    (run / "recipe.yaml").write_text(edit.apply(recipe_of(run)).to_yaml())


def unquantised(run: Path) -> Recipe:
    return Edit({"model.quantization": "none"}).apply(recipe_of(run))


def on_the_hub(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a checkpoint under the names that LLaVA has on the hub."""
    return {name_on_the_hub(name): tensor for name, tensor in tensors.items()}


def name_on_the_hub(name: str) -> str:
    """`language_model.model.layers...`, `vision_tower.vision_model.embeddings...`"""
    if name.startswith("language_model."):
        return name
    return (
        name.replace("model.language_model.", "language_model.model.")
        .replace("lm_head", "language_model.lm_head")
        .replace("model.vision_tower", "vision_tower")
        .replace("vision_tower.", "vision_tower.vision_model.")
        .replace("model.multi_modal", "multi_modal")
    )


def rows_of(run: Path, task: str, split: str = "test") -> Dataset:
    rows = load_split(recipe_of(run).data, split)
    return rows.select(indices_by_task(rows)[task])


def dense(update: LowRank) -> Tensor:
    return update.up_OK @ update.down_KI


def logits(session: Session, rows: Any) -> Tensor:
    inputs = session.on_device(session.collator(list(rows)))
    inputs.pop("labels")
    with torch.no_grad(), session.evaluating():
        return session.model(**inputs, use_cache=False).logits


def save_inputs(session: Session, rows: Any, path: Path) -> Path:
    inputs = session.collator(list(rows))
    save_file({name: value for name, value in inputs.items() if name in MODEL_INPUTS}, path)
    return path


def in_its_own_process(script: str, *arguments: object) -> dict[str, Any]:
    """Run a script in a process of its own, on one thread; return the JSON that it prints last."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def without_qmixlora(script: str, *arguments: object) -> dict[str, Any]:
    """`in_its_own_process`, which must not import qmixlora."""
    guard = "\nimport sys\nassert not any(name.split('.')[0] == 'qmixlora' for name in sys.modules)\n"
    return in_its_own_process(script + guard, *arguments)
