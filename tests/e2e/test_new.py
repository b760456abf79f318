"""Three commands lead from data to exports: new, train, export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.conftest import CommandLine


@pytest.mark.long
def test_new_train_and_export_lead_to_adapters(
    qmixlora: CommandLine, backbone: Path, data: Path, tmp_path: Path
) -> None:
    file, run = tmp_path / "own.yaml", tmp_path / "run"
    settled = ("model.dtype=float32", f"train.output={run}", "train.max_steps=4", "export.polish=0", "adapter.r=2")
    made = qmixlora("new", "--model", backbone, "--data", data / "train.json", "--vram", 2, "--out", file, *settled)
    assert made.code == 0, made.stderr
    assert "Planned peak" in made.stdout and f"Next: qmixlora train {file}" in made.stdout
    for command in (("train", file), ("export", run, "--all", "--as", "lora")):
        done = qmixlora(*command)
        assert done.code == 0, done.stderr
    assert list((run / "exports").glob("*/adapter_model.safetensors"))
    # ten tasks of three samples, of which three are held out: what has none there is measured on training samples
    fidelities = [json.loads(path.read_text()) for path in (run / "exports").glob("*/fidelity.json")]
    splits = [one["split"] for one in fidelities]
    assert {*splits} == {"validation", "train"} and all(
        one["held_out"] == (one["split"] != "train") for one in fidelities
    )
    assert done.stdout.count("measured on samples that it was trained on") == splits.count("train")
    again = qmixlora("new", "--model", backbone, "--data", data / "train.json", "--vram", 2, "--out", file)
    assert again.code == 2 and "The file exists" in again.stderr


@pytest.mark.long
def test_new_takes_plain_columns_by_their_usual_names(qmixlora: CommandLine, backbone: Path, tmp_path: Path) -> None:
    """Thirty drawn pictures in a table, which nothing but its header explains."""
    lines = ["file_name,prompt,label,kind"]
    for index in range(30):
        color = ("red", "green", "blue")[index % 3]
        Image.new("RGB", (40, 30 + index), color).save(tmp_path / f"{index}.png")
        lines.append(f"{index}.png,which color has it ?,{color},{('plain', 'other')[index % 2]}")
    (tmp_path / "data.csv").write_text("\n".join(lines))
    file, settled = tmp_path / "own.yaml", ("model.dtype=float32", "data.columns.task=kind")
    made = qmixlora("new", "--model", backbone, "--data", tmp_path / "data.csv", "--vram", 2, "--out", file, *settled)
    assert made.code == 0, made.stderr
    assert "data.columns.answer=label" in made.stdout and "by its name in the data" in made.stdout
    recipe = yaml.safe_load(file.read_text())
    named = {"question": "prompt", "answer": "label", "image": "file_name", "task": "kind"}  # one of them by hand
    assert recipe["data"]["columns"] == named
    trained = qmixlora("train", file, "train.max_steps=2", f"train.output={tmp_path / 'run'}")
    assert trained.code == 0, trained.stderr


def test_new_knows_the_models_and_data_that_are_made_here(
    qmixlora: CommandLine, backbone: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmixlora.demo.made_here.make_with_progress", lambda name, console: backbone)
    monkeypatch.setattr("qmixlora.demo.made_here.make_data", lambda name, folder: data)
    file = tmp_path / "own.yaml"
    made = qmixlora(
        "new", "--model", "embedded", "--data", "embedded", "--vram", 2, "--out", file, "model.dtype=float32"
    )
    assert made.code == 0, made.stderr
    recipe = yaml.safe_load(file.read_text())
    assert (recipe["model"]["id"], recipe["data"]["train"]) == ("embedded", "embedded")
