"""Three commands lead from data to exports: new, train, export."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import CommandLine


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
    again = qmixlora("new", "--model", backbone, "--data", data / "train.json", "--vram", 2, "--out", file)
    assert again.code == 2 and "The file exists" in again.stderr
