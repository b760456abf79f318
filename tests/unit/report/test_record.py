"""What a report takes from the files of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qmixlora.recipe import validate
from qmixlora.report.contents import ExportFidelity
from qmixlora.report.record import RunRecord

VALUES = {"model": {"id": "someone/model"}, "data": {"train": "train.json"}, "train": {"gradient_accumulation": 2}}
RECIPE = validate(VALUES, "test")
FIDELITY = {"form": "lora", "rank": 4, "polish_steps": 0, "split": "test", "exact_match": {"live": 1, "lora": 0.5}}


def test_the_speed_is_by_the_samples_that_were_logged(tmp_path: Path) -> None:
    """Micro-batches that are filled by tokens, and several processes, take other numbers than the recipe's product."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.to_yaml(), encoding="utf-8")
    logs = [{"step": 1, "loss": 1.0, "seconds": 1.0, "samples": 12}, {"step": 2, "loss": 1.0, "seconds": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in logs), encoding="utf-8")
    assert list(RunRecord.read(tmp_path).speeds()) == [(1, 12.0), (2, 2.0)]  # the second as earlier releases logged it


def test_each_start_of_a_run_counts_its_own_seconds(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.to_yaml(), encoding="utf-8")
    times = [(1, 10.0), (2, 20.0), (3, 10.1), (4, 20.1), (5, 1.0)]  # resumed from step 2, and from step 4
    logs = [{"step": step, "loss": 1.0, "seconds": seconds, "samples": 20} for step, seconds in times]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in logs), encoding="utf-8")
    events = [{"event": "started", "step": 0}, {"event": "resumed", "step": 2}, {"event": "resumed", "step": 4}]
    (tmp_path / "history.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in events), encoding="utf-8")
    speeds = [(step, round(speed, 2)) for step, speed in RunRecord.read(tmp_path).speeds()]
    assert speeds == [(1, 2.0), (2, 2.0), (3, 1.98), (4, 2.0), (5, 20.0)]


@pytest.mark.parametrize("name", ["run", "run \udcff"])
def test_an_export_is_read_whatever_its_runs_name_and_its_numbers_are(tmp_path: Path, name: str) -> None:
    """A name may be no text, a number none, and the keys more than are shown."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.to_yaml(), encoding="utf-8")
    export = tmp_path / "exports" / "s-lora"
    export.mkdir(parents=True)
    more = {"folder": f"/{name}/exports/s-lora", "agreement": {"lora": 1}, "update_error": {"mean": float("nan")}}
    (export / "fidelity.json").write_text(json.dumps(FIDELITY | more | {"notes": []}))
    record = RunRecord.read(tmp_path)
    [read] = record.exports
    assert isinstance(read, ExportFidelity) and read.name == "s-lora" and record.damaged == []
