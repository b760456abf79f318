"""Damaged checkpoints are left out; the run ends as it would have. Never a traceback, never another result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmixlora.manifest import MANIFEST
from tests.conftest import CommandLine

from .conftest import Runs
from .damages import DAMAGES, Damage, doubled, emptied, flipped, missing, truncated, zeroed, zeroed_at_the_end

CHECKPOINT, OLDER = "checkpoints/checkpoint-4", "checkpoints/checkpoint-2"
WEIGHTS = "adapter/adapter_model.safetensors"
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights(two_runs: Runs) -> Weights:
    """The adapter of the whole run."""
    return load_file(two_runs.finished[0] / WEIGHTS)


def resumed(qmixlora: CommandLine, run: Path, *overrides: str) -> Any:
    return qmixlora("train", run / "recipe.yaml", "--resume", *overrides)


def same(weights: Weights, run: Path) -> bool:
    own = load_file(run / WEIGHTS)
    return own.keys() == weights.keys() and all(torch.equal(own[name], tensor) for name, tensor in weights.items())


FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "routing.safetensors",
    "routing_sums.safetensors",
    MANIFEST,
)
FAST = {("optimizer.pt", truncated), ("adapter_model.safetensors", flipped), ("trainer_state.json", emptied)}
REST = pytest.mark.exhaustive
TABLE = [
    pytest.param(name, damage, id=f"{name} {damage.__name__}", marks=() if (name, damage) in FAST else REST)
    for name in FILES
    for damage in DAMAGES
]


@pytest.mark.parametrize(("name", "damage"), TABLE)
def test_a_damaged_checkpoint_is_left_out_and_the_run_ends_as_it_would_have(
    qmixlora: CommandLine, weights: Weights, killed: Path, name: str, damage: Damage
) -> None:
    file = killed / CHECKPOINT / name
    whole = file.read_bytes()
    damage(file)
    harmless = (damage is missing and name == MANIFEST) or (damage is not missing and file.read_bytes() == whole)
    done = resumed(qmixlora, killed)
    assert done.code == 0 and same(weights, killed), done.stderr
    assert harmless or (f"{CHECKPOINT} is left out: " in done.stderr and "step     3/4" in done.stdout)
    assert harmless or name in done.stderr or name in (MANIFEST, "trainer_state.json")


@pytest.mark.parametrize("name", FILES[:-1])
@pytest.mark.exhaustive
def test_a_file_of_another_run_in_a_checkpoint_is_noticed(
    qmixlora: CommandLine, two_runs: Runs, weights: Weights, killed: Path, name: str
) -> None:
    whole = (killed / CHECKPOINT / name).read_bytes()
    shutil.copyfile(two_runs.killed[1] / CHECKPOINT / name, killed / CHECKPOINT / name)
    unchanged = (killed / CHECKPOINT / name).read_bytes() == whole
    done = resumed(qmixlora, killed)
    assert done.code == 0 and same(weights, killed), done.stderr
    assert unchanged or f"left out: {name}" in done.stderr


@pytest.mark.parametrize("damage", [truncated, missing], ids=lambda damage: damage.__name__)
def test_a_damaged_file_that_nobody_reads_costs_no_step(
    qmixlora: CommandLine, weights: Weights, killed: Path, damage: Damage
) -> None:
    damage(killed / CHECKPOINT / "training_args.bin")
    done = resumed(qmixlora, killed)
    assert done.code == 0 and "left out" not in done.stderr and same(weights, killed)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(*row, id=f"{row[0]} {row[1].__name__}", marks=() if number == 0 else REST)
        for number, row in enumerate(
            [
                *((name, damage) for name in FILES[:-1] for damage in (truncated, zeroed, emptied, missing)),
                ("optimizer.pt", flipped),  # torch.save has checksums; safetensors and JSON have none
                ("rng_state.pth", flipped),
                ("optimizer.pt", zeroed_at_the_end),
            ]
        )
    ],
)
def test_a_checkpoint_without_a_manifest_is_read_before_it_is_trusted(
    qmixlora: CommandLine, weights: Weights, killed: Path, name: str, damage: Damage
) -> None:
    for manifest in killed.rglob(MANIFEST):
        manifest.unlink()
    damage(killed / CHECKPOINT / name)
    done = resumed(qmixlora, killed)
    assert done.code == 0 and same(weights, killed), done.stderr
    told = f"left out: {name}" in done.stderr or "never finished" in done.stderr
    assert told


def test_without_a_whole_checkpoint_each_is_named_and_nothing_is_touched(qmixlora: CommandLine, killed: Path) -> None:
    truncated(killed / CHECKPOINT / "optimizer.pt")
    missing(killed / OLDER / "scheduler.pt")
    before = sorted(killed.rglob("*"))
    done = resumed(qmixlora, killed)
    assert done.code == 2 and "no checkpoint to resume from" in done.stderr
    assert "checkpoint-4 is left out: optimizer.pt" in done.stderr
    assert "checkpoint-2 is left out: scheduler.pt is missing" in done.stderr
    assert sorted(killed.rglob("*")) == before


def test_a_checkpoint_of_a_later_release_is_refused_by_its_version(qmixlora: CommandLine, killed: Path) -> None:
    content = json.loads((killed / CHECKPOINT / MANIFEST).read_text())
    (killed / CHECKPOINT / MANIFEST).write_text(json.dumps({**content, "version": 2}))
    done = resumed(qmixlora, killed)
    assert done.code == 2 and "its format is 2, and this release knows 1" in done.stderr


def test_a_pickle_is_never_run(qmixlora: CommandLine, weights: Weights, killed: Path, tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    for manifest in killed.rglob(MANIFEST):  # in a checkpoint that is taken without one
        manifest.unlink()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": Malicious()}, killed / CHECKPOINT / name)
    done = resumed(qmixlora, killed)
    assert done.code == 0 and "optimizer.pt cannot be read" in done.stderr and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("metrics.jsonl", lambda file: file.write_bytes(file.read_bytes()[:-20])),
        pytest.param("metrics.jsonl", zeroed, marks=pytest.mark.long),
        pytest.param("metrics.jsonl", missing, marks=pytest.mark.long),
        ("metrics.jsonl", lambda file: file.write_text('{"step": "x"}\n[1]\n{"loss": 1}\n')),
        ("routing.safetensors", truncated),
        pytest.param("routing.safetensors", missing, marks=pytest.mark.long),
    ],
    ids=["torn last line", "log of zeros", "no log", "log of other things", "cut record", "no record"],
)
def test_a_run_resumes_whatever_lies_beside_its_checkpoints(
    qmixlora: CommandLine, weights: Weights, killed: Path, name: str, damage: Damage
) -> None:
    damage(killed / name)
    done = resumed(qmixlora, killed, "train.max_steps=6")
    assert done.code == 0, done.stderr
    records = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["step"] > 4 and "loss" in record] == [5, 6]


def test_a_checkpoint_of_another_shape_is_named_before_the_first_step(qmixlora: CommandLine, killed: Path) -> None:
    for checkpoint in (killed / "checkpoints").iterdir():
        (checkpoint / MANIFEST).unlink()
        file = checkpoint / "adapter_model.safetensors"
        save_file(doubled(load_file(file)), file)
    done = resumed(qmixlora, killed)
    assert done.code == 2 and "does not fit the backbone" in done.stderr and "in the file, and" in done.stderr
