"""A base is told from another by its weights alone: wherever they lie, in how many files, at which commit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PretrainedConfig

from qmixlora.backbone import how_to_bring_back, others_in
from qmixlora.backbone.weights import SLICE, digest_of, recorded
from qmixlora.recipe import Model

BEFORE, NOW = {"weights": "a", "commit": "1"}, {"weights": "b", "commit": "2"}


def of_folder(folder: Path) -> dict[str, str]:
    return recorded(Model(id=str(folder)), PretrainedConfig())


def test_the_same_weights_in_several_files_are_the_same(backbone: Path, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(backbone)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    assert of_folder(tmp_path) == of_folder(backbone) != {}


def test_a_change_in_any_tensor_shows(backbone: Path, tmp_path: Path) -> None:
    tensors = load_file(backbone / "model.safetensors")
    own = digest_of([backbone / "model.safetensors"])
    for name, tensor in tensors.items():
        file = tmp_path / "other.safetensors"
        save_file({**tensors, name: tensor * 1.01 + 1e-3}, file)
        assert digest_of([file]) != own, name


def test_names_kinds_and_shapes_show(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    digests = set()
    for name, zeros in (
        ("a", torch.zeros(4, 2)),
        ("b", torch.zeros(4, 2)),
        ("a", torch.zeros(2, 4)),
        ("c", torch.empty(0)),
    ):
        for tensor in (zeros, zeros.half()):
            save_file({name: tensor}, file)
            digests.add(digest_of([file]))
    assert len(digests) == 8


def test_little_is_read_of_a_large_tensor_and_both_of_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmixlora.backbone.weights.SLICES", 3)
    file = tmp_path / "one.safetensors"
    zeros, size = torch.zeros(9 * SLICE, dtype=torch.uint8), 9 * SLICE
    save_file({"a": zeros}, file)
    own, noticed = digest_of([file]), []
    for at in range(0, size, SLICE):
        save_file({"a": torch.where(torch.arange(size) // SLICE == at // SLICE, 1, zeros).to(torch.uint8)}, file)
        noticed.append(digest_of([file]) != own)
    assert noticed == [True, False, False, False, True, False, False, False, True]


def test_a_model_whose_files_are_not_found_has_no_record(tmp_path: Path) -> None:
    assert of_folder(tmp_path) == {} and recorded(Model(id="nobody/nothing"), PretrainedConfig()) == {}


def test_a_record_is_compared_by_weights_and_brought_back_by_commit() -> None:
    assert others_in(BEFORE, NOW) == "weights"
    assert not others_in(BEFORE, {**NOW, "weights": "a"}) and not others_in({}, NOW)
    assert how_to_bring_back(BEFORE, NOW) == "set model.revision: 1"
    assert how_to_bring_back({"weights": "a"}, NOW) == how_to_bring_back(BEFORE, {**NOW, "commit": "1"})


LOAD = """
import json
from qmixlora.backbone import base_record, load_backbone
from qmixlora.recipe import Model
spec = Model(id="someone/model", dtype="float32")
model, processor, _ = load_backbone(spec)
print(json.dumps(base_record(spec, model.config, processor)))
"""


def test_a_model_on_the_hub_is_known_by_its_commit_and_its_weights(backbone: Path, tmp_path: Path) -> None:
    """`main` moves: to a commit with the same weights, and to one with others."""
    cache = tmp_path / "hub" / "models--someone--model"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(cache.parent), "HF_HUB_OFFLINE": "1"}
    (cache / "refs").mkdir(parents=True)
    records = []
    for digit in "abc":
        snapshot = Path(shutil.copytree(backbone, cache / "snapshots" / (digit * 40)))
        if digit == "c":
            tensors = load_file(snapshot / "model.safetensors")
            save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, snapshot / "model.safetensors")
        (cache / "refs" / "main").write_text(digit * 40)
        done = subprocess.run(
            [sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        records.append(json.loads(done.stdout.splitlines()[-1]))
    assert [record["commit"] for record in records] == ["a" * 40, "b" * 40, "c" * 40]
    assert [others_in(records[0], record) for record in records] == ["", "", "weights"]
    assert records[0]["weights"] == of_folder(backbone)["weights"]


@pytest.mark.parametrize(
    ("own", "now", "others"),
    [
        ({"weights": "a"}, {"weights": "a", "commit": "c"}, False),
        ({"weights": "a"}, {"weights": "b"}, True),
        ({}, {"weights": "b"}, False),
        ({"weights": "a"}, {}, False),
        ({}, {}, False),
    ],
)
def test_weights_are_others_where_both_are_known(own: dict[str, str], now: dict[str, str], others: bool) -> None:
    assert bool(others_in(own, now)) is others
