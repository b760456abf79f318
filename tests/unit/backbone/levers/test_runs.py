"""Runs with levers: trained, resumed, evaluated and exported as without."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import nn

from qmixlora.backbone.levers import host_tensors
from qmixlora.data import load_split
from qmixlora.evaluation import answer_rows
from qmixlora.export import Request, export
from qmixlora.recipe import Recipe
from qmixlora.session import open_run
from qmixlora.training import train

from .helpers import ALL

QUIET = Console(quiet=True)
IN_16_BITS = {"quantization": "none", "stream_layers": 0}  # only NF4 weights are streamed


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("more", [{}, pytest.param(IN_16_BITS, marks=pytest.mark.long)])
def test_runs_with_levers_train_and_answer_as_without(
    more: dict[str, Any], recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    without = {key: value for key, value in more.items() if key == "quantization"}
    finals, answers = [], []
    for name, levers in (("without", without), ("with", {**ALL, "quantize_lm_head": "none", **more})):
        recipe = recipe_of(levers, train={"max_steps": 4, "output": str(tmp_path / name)})
        folder = train(recipe, console=QUIET)
        rows = load_split(recipe.data, "test").select(range(6))
        answers.append(answer_rows(open_run(folder), rows, batch_size=3, max_new_tokens=4))
        finals.append(weights(folder))
    assert finals[0] == finals[1]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("more", [{}, IN_16_BITS])
def test_runs_with_levers_are_resumed(more: dict[str, Any], recipe_of: Callable[..., Recipe]) -> None:
    recipe = recipe_of({**ALL, "quantize_lm_head": "none", **more}, train={"max_steps": 4, "save_every": 2})
    folder = train(recipe, console=QUIET)
    straight = weights(folder)
    (folder / "checkpoints" / "checkpoint-4" / "trainer_state.json").unlink()  # as if it had ended before
    train(recipe, resume=True, console=QUIET)
    assert weights(folder) == straight


def test_a_merged_checkpoint_is_opened_without_the_levers_of_its_run(
    deep: Path, recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    """What stock transformers loads: nothing quantised, nothing elsewhere."""
    folder = tmp_path / "merged"
    shutil.copytree(deep, folder)
    (folder / "recipe.yaml").write_text(recipe_of(ALL).to_yaml(), encoding="utf-8")
    model: Any = open_run(folder).model
    assert type(model.get_output_embeddings()) is nn.Linear and host_tensors(model) == []


@pytest.mark.long
@pytest.mark.parametrize("base", ["original", "nf4"])
def test_a_run_with_levers_is_exported(base: Any, recipe_of: Callable[..., Recipe]) -> None:
    """Streamed layers are not read for it; a head in 4 bits is merged as the 16-bit one that the checkpoint has."""
    folder = train(recipe_of(ALL, train={"max_steps": 2}))
    request = Request(tasks=("color",), forms=("lora", "merged"), base=base, polish=0, samples=2)
    lora, merged = export(folder, request, Console(quiet=True))
    assert (lora.form, merged.form) == ("lora", "merged")
    assert merged.merging is not None and merged.merging.logits_difference < 1e-3
