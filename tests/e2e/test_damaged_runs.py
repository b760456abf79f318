"""A damaged run, export or backbone is one message; what was edited is named. Never a traceback, never in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmixlora.manifest import MANIFEST
from tests.conftest import CommandLine

from .conftest import Runs
from .damages import DAMAGES, Damage, doubled, emptied, flipped, missing, truncated, zeroed

OTHER_BASE = "this is not what the adapter was trained on: "
WEIGHTS, CONFIG = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"


ADAPTER = [
    *((name, damage) for name in (WEIGHTS, CONFIG) for damage in DAMAGES),
    *(("recipe.yaml", damage) for damage in (zeroed, emptied, missing)),
]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(*row, id=f"{row[0]} {row[1].__name__}", marks=() if number % 4 == 0 else pytest.mark.long)
        for number, row in enumerate(ADAPTER)
    ],
)
def test_a_damaged_run_is_not_evaluated(qmixlora: CommandLine, finished: Path, name: str, damage: Damage) -> None:
    damage(finished / name)
    done = qmixlora("eval", finished)
    assert done.code == 2 and "Traceback" not in done.stderr
    assert Path(name).name in done.stderr and "where:" in done.stderr


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_files_of_another_run_are_noticed(qmixlora: CommandLine, two_runs: Runs, finished: Path, name: str) -> None:
    shutil.copyfile(two_runs.finished[1] / name, finished / name)
    if name == CONFIG:  # that of the same settings is the same
        config = json.loads((finished / name).read_text())
        (finished / name).write_text(json.dumps({**config, "dropout": 0.5}))
    done = qmixlora("eval", finished)
    assert done.code == 2 and f"not as it was written: {name}" in done.stderr


def test_other_weights_below_a_run_are_told_and_moved_ones_are_not(
    qmixlora: CommandLine, backbone: Path, finished: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(backbone, tmp_path / "moved"))
    recipe = (finished / "recipe.yaml").read_text()
    (finished / "recipe.yaml").write_text(recipe.replace(str(backbone), str(moved)))
    done = qmixlora("eval", finished, "--task", "digit")
    assert done.code == 0 and OTHER_BASE not in done.stderr
    nudge(moved / "model.safetensors")
    for command in (
        ["eval", finished, "--task", "digit"],
        ["export", finished, "--task", "digit", "--polish", 0, "--samples", 1, "--projector", "adapter"],
        ["eval", finished / "exports" / "digit-lora"],
        ["inspect", finished, "--interference", "--batches", 1],
    ):
        done = qmixlora(*command)
        assert done.code == 0 and done.stderr.count(OTHER_BASE) == 1, (command, done.stderr)
    assert f"of {moved}, {OTHER_BASE}weights." in done.stderr and "bring back what there was" in done.stderr
    shutil.copyfile(backbone / "model.safetensors", moved / "model.safetensors")
    template = moved / "chat_template.jinja"
    template.write_text("Please " + template.read_text())
    for command in (["eval", finished, "--task", "digit"], ["inspect", finished, "--samples", 1]):
        done = qmixlora(*command)
        assert done.code == 0 and done.stderr.count(f"{OTHER_BASE}chat template.") == 1, (command, done.stderr)


def nudge(file: Path) -> None:
    """Change one tensor of a checkpoint a little, as training it would."""
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    save_file({**tensors, name: tensors[name] + 1e-3}, file, {"format": "pt"})


@pytest.mark.parametrize("keep", [0.5, 0.8, 0.99])
def test_a_recipe_that_was_cut_short_is_told(qmixlora: CommandLine, finished: Path, keep: float) -> None:
    text = (finished / "recipe.yaml").read_text()
    lines = text.splitlines(keepends=True)
    (finished / "recipe.yaml").write_text("".join(lines[: int(keep * len(lines))]))
    done = qmixlora("eval", finished)
    assert done.code == 2 or "the recipe was changed since the run wrote it: recipe.yaml has" in done.stderr


@pytest.mark.parametrize("verb", [("export", "--task", "digit", "--polish", 0), ("inspect", "--routing")])
@pytest.mark.parametrize("damage", [truncated, zeroed, flipped, emptied], ids=lambda damage: damage.__name__)
def test_a_damaged_record_of_the_routing_is_not_used(
    qmixlora: CommandLine, finished: Path, verb: tuple[Any, ...], damage: Damage
) -> None:
    damage(finished / "routing.safetensors")
    done = qmixlora(verb[0], finished, *verb[1:])
    assert done.code == 2 and "routing.safetensors" in done.stderr and not (finished / "exports").exists()


EDITS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "is not in the file": lambda tensors: dict(list(tensors.items())[1:]),
    "has no place here": lambda tensors: {**tensors, "base_model.model.other.weight": torch.zeros(1)},
    "in the file, and": doubled,
    "not finite": lambda tensors: {name: tensor / 0 for name, tensor in tensors.items()},
}


@pytest.mark.parametrize("verb", ["eval", "chat", "export"])
@pytest.mark.parametrize("words", EDITS)
def test_an_adapter_that_does_not_fit_is_named_by_its_first_tensor(
    qmixlora: CommandLine, finished: Path, verb: str, words: str
) -> None:
    save_file(EDITS[words](load_file(finished / WEIGHTS)), finished / WEIGHTS)
    more = {"eval": (), "chat": ("--prompt", "what ?"), "export": ("--all",)}[verb]
    done = qmixlora(verb, finished, *more)
    assert done.code == 2 and words in done.stderr and str(finished / WEIGHTS) in done.stderr


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"alpha": 16.0}, "alpha is 16.0 and 4.0"),
        ({"r": 3}, "r is 3 and 2"),
        ({"route_on": "instruction"}, "route_on is 'instruction' and 'embedding'"),
        ({"gate": "none"}, "gate='none'"),
        ({"peft_type": "LORA"}, "method is 'lora' and 'mixlora'"),
        ({"peft_type": "NOTHING"}, "NOTHING"),
        ({"format_version": 2}, "its format is 2, and this release knows 1"),
    ],
)
def test_an_edited_config_is_named(qmixlora: CommandLine, finished: Path, edit: dict[str, Any], words: str) -> None:
    (finished / MANIFEST).unlink()
    file = finished / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **edit}))
    done = qmixlora("eval", finished)
    assert done.code == 2 and words in done.stderr, done.stderr


@pytest.mark.parametrize("damage", [truncated, emptied, flipped], ids=lambda damage: damage.__name__)
def test_a_damaged_fidelity_is_not_taken_for_the_tasks_of_an_export(
    qmixlora: CommandLine, finished: Path, damage: Damage
) -> None:
    assert qmixlora("export", finished, "--task", "digit", "--polish", 0, "--samples", 1).code == 0
    damage(finished / "exports" / "digit-lora" / "fidelity.json")
    done = qmixlora("eval", finished / "exports" / "digit-lora")
    assert done.code == 2 and "fidelity.json" in done.stderr


@pytest.mark.parametrize("damage", [truncated, zeroed, emptied], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_backbone_is_one_message(
    qmixlora: CommandLine, backbone: Path, recipe_file: Path, tmp_path: Path, name: str, damage: Damage
) -> None:
    shutil.copytree(backbone, tmp_path / "backbone")
    damage(tmp_path / "backbone" / name)
    done = qmixlora("train", recipe_file, f"model.id={tmp_path / 'backbone'}")
    assert done.code == 2 and "Cannot load the model" in done.stderr
