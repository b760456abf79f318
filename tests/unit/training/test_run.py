"""A run: its folder, and going on from a checkpoint."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import qmixlora.session
from qmixlora.errors import UserError
from qmixlora.recipe import Recipe
from qmixlora.training import train

from .helpers import QUIET


@pytest.mark.parametrize(
    "adapter", [{"task_mix": 0.5, "dropout": 0.1}, {"route_on": "task"}, {"method": "lora", "dropout": 0.1}]
)
def test_resuming_equals_a_straight_run(
    make_recipe: Callable[..., Recipe], tmp_path: Path, adapter: dict[str, Any]
) -> None:
    spec = {"max_steps": 6, "save_every": 3, "gradient_accumulation": 2, "micro_batch_size": 2}
    straight = train(make_recipe(adapter=adapter, train={**spec, "output": str(tmp_path / "a")}), console=QUIET)
    resumed = tmp_path / "b"
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "adapter")
    shutil.rmtree(resumed / "checkpoints" / "checkpoint-6")
    (resumed / "checkpoints" / "checkpoint-5").mkdir()  # a crash in the middle of saving
    train(make_recipe(adapter=adapter, train={**spec, "output": str(resumed)}), resume=True, console=QUIET)
    weights = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (straight, resumed)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    steps = [json.loads(line)["step"] for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5, 6]


def test_a_run_is_never_overwritten(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe()
    folder = Path(recipe.train.output)
    folder.mkdir()
    (folder / "precious").touch()
    with pytest.raises(UserError, match="not empty"):
        train(recipe, console=QUIET)
    assert [path.name for path in folder.iterdir()] == ["precious"]


def test_there_is_nothing_to_resume_without_a_checkpoint(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        train(make_recipe(), resume=True, console=QUIET)


@pytest.mark.parametrize(("projector", "is_told"), [("full", True), ("frozen", False)])
def test_a_projector_that_was_not_found_is_told(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, projector: str, is_told: bool
) -> None:
    load = qmixlora.session.load_backbone

    def unknown(*arguments: Any, **place: Any) -> Any:
        backbone, processor, anatomy = load(*arguments, **place)
        return backbone, processor, replace(anatomy, projectors=(), projector_targets=())

    monkeypatch.setattr(qmixlora.session, "load_backbone", unknown)
    told = io.StringIO()
    train(make_recipe(adapter={"projector": projector}, train={"max_steps": 1}), console=Console(file=told))
    assert ("no projector was found" in told.getvalue()) == is_told
